"""Runs of all contestants under all settings, interleaved, so that a slow phase of the machine affects all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import attrs

from specplug.bench.contestants import Contestant, OnStep, why_missing
from specplug.bench.measurement import Measurement
from specplug.bench.workload import Cell, Workload

OnRun = Callable[[Contestant, Cell, int], None]


@attrs.frozen(eq=False)
class Comparison:
    """The measurements.

    Attributes:
        workload: that was generated.
        cells: the settings.
        contestants: the rows, plain decoding first.
        repetitions: of each measurement.
        runs: the repetitions by setting and label, in order; empty if a contestant cannot run a setting.
    """

    workload: Workload
    cells: Sequence[Cell]
    contestants: Sequence[Contestant]
    repetitions: int
    runs: dict[tuple[Cell, str], list[Measurement]]


@attrs.frozen(eq=False)
class Watcher:
    """Callbacks that report progress.

    Attributes:
        on_open: called before a contestant opens; returns the callback for its startup steps.
        on_run: called before each run with its repetition; 0 is the warm-up.
        advance: called with the number of new tokens, in warm-ups too.
    """

    on_open: Callable[[Contestant], OnStep] = lambda contestant: lambda report: None
    on_run: OnRun = lambda contestant, cell, repetition: None
    advance: Callable[[int], None] = lambda tokens: None


def compare(
    contestants: Sequence[Contestant],
    cells: Sequence[Cell],
    workload: Workload,
    repetitions: int,
    watcher: Watcher,
    *,
    one_at_a_time: bool = False,
) -> Comparison:
    """Measures all contestants; each runs every setting once as a warm-up.

    A contestant that learns must not know the measured prompts: it is reopened for every counted run, and warmed up with
    random tokens.

    Args:
        contestants: the rows, plain decoding first.
        cells: the settings.
        workload: to generate.
        repetitions: of each measurement.
        watcher: receives the progress.
        one_at_a_time: keep only one contestant open, and reopen it in every repetition.
    """
    if not one_at_a_time:
        with ExitStack() as stack:
            for contestant in contestants:
                open_contestant(contestant, stack, watcher)
            return compare_open(contestants, cells, workload, repetitions, watcher)
    result = _empty(contestants, cells, workload, repetitions)
    for repetition in range(1, repetitions + 1):
        for contestant in _rotated(contestants, repetition):
            with ExitStack() as stack:
                open_contestant(contestant, stack, watcher)
                for cell in cells:
                    _run(result, contestant, cell, 0, watcher)
                    _run(result, contestant, cell, repetition, watcher)
    return result


def compare_open(
    contestants: Sequence[Contestant],
    cells: Sequence[Cell],
    workload: Workload,
    repetitions: int,
    watcher: Watcher,
) -> Comparison:
    """Does the same as `compare` with contestants that are open."""
    result = _empty(contestants, cells, workload, repetitions)
    for cell in cells:
        for repetition in range(repetitions + 1):
            for contestant in _rotated(contestants, repetition):
                _run(result, contestant, cell, repetition, watcher)
    return result


def open_contestant(contestant: Contestant, stack: ExitStack, watcher: Watcher) -> None:
    """Opens a contestant; the stack closes it."""
    stack.callback(contestant.close)
    contestant.open(watcher.on_open(contestant))


def tokens_to_generate(
    contestants: Sequence[Contestant],
    cells: Sequence[Cell],
    workload: Workload,
    repetitions: int,
    *,
    one_at_a_time: bool,
) -> int:
    """Returns how many tokens `compare` will generate, with warm-ups. `learns` is known only after a contestant was open."""
    able = [(c, cell) for c in contestants for cell in cells if why_missing(c, workload, cell) is None]
    return sum(
        workload.num_tokens(cell.batch) * (2 * repetitions if one_at_a_time or c.learns else repetitions + 1)
        for c, cell in able
    )


def _empty(
    contestants: Sequence[Contestant], cells: Sequence[Cell], workload: Workload, repetitions: int
) -> Comparison:
    runs: dict[tuple[Cell, str], list[Measurement]] = {(cell, c.label): [] for cell in cells for c in contestants}
    return Comparison(workload, cells, contestants, repetitions, runs)


def _run(result: Comparison, contestant: Contestant, cell: Cell, repetition: int, watcher: Watcher) -> None:
    """Runs a contestant once; repetition 0 is a warm-up."""
    if why_missing(contestant, result.workload, cell) is not None or (contestant.learns and not repetition):
        return
    if contestant.is_taught:
        contestant.close()
        contestant.open(watcher.on_open(contestant))
    watcher.on_run(contestant, cell, repetition)
    if contestant.learns:
        contestant.run(result.workload.unrelated(), cell, watcher.advance)
    measured = contestant.run(result.workload, cell, watcher.advance)
    if repetition:
        result.runs[cell, contestant.label].append(measured)


def _rotated(contestants: Sequence[Contestant], by: int) -> Iterator[Contestant]:
    """Yields the contestants in order, with a different first one in every repetition."""
    start = by % len(contestants)
    yield from contestants[start:]
    yield from contestants[:start]
