"""The six steps of a start: each is timed and reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs

from specplug.errors import SpecplugError, StartupError

STEPS = (
    "plan from configuration and headers",
    "load target weights",
    "load draft weights",
    "allocate KV cache and buffers",
    "warm up",
    "ready",
)


@attrs.frozen
class StepReport:
    """The progress of one startup step.

    Attributes:
        number: 1 to 6; 0 for the compilation of the native kernels, once, within the first step.
        name: the step's name.
        seconds: its duration; None while it runs.
        fraction: the part of it that is done, between 0 and 1.
        elapsed: seconds since it began, if no fraction is known.
    """

    number: int
    name: str
    seconds: float | None = None
    fraction: float = 0.0
    elapsed: float = 0.0


OnStep = Callable[[StepReport], None]


@attrs.define
class Clock:
    """Seconds of a step that are reported as another step."""

    left_out: float = 0.0


@contextmanager
def startup_step(number: int, on_step: OnStep) -> Iterator[Clock]:
    """Runs one step: reports its beginning and its end, and names it in what it raises."""
    name = STEPS[number - 1]
    on_step(StepReport(number, name))
    started = time.perf_counter()
    clock = Clock()
    try:
        yield clock
    except SpecplugError as error:
        error.add_note(f"startup step {number} of {len(STEPS)}: {name}")
        raise
    except Exception as error:
        raise StartupError(f"startup step {number} of 6 ({name}) failed: {type(error).__name__}: {error}") from error
    on_step(StepReport(number, name, time.perf_counter() - started - clock.left_out, 1.0))
