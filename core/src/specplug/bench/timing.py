"""Seconds of the target's forwards and of the proposals, step by step, without changing what is timed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import attrs
import torch

if TYPE_CHECKING:
    from specplug.engine.engine import Engine


@attrs.frozen
class StepCosts:
    """What one step of the engine took.

    Attributes:
        forward_seconds: in the target's forward.
        draft_seconds: in the speculators' `propose`.
    """

    forward_seconds: float
    draft_seconds: float


class EngineTimer:
    """Watches an engine. On a GPU, forwards are timed by events in its stream, so that nothing is synchronised.

    Proposals are timed by the engine itself, on the host's clock: they begin after the step's synchronisation.

    Args:
        engine: it is watched until `detach`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._forward = engine.runner.forward
        self._is_cuda = engine.runner.device.type == "cuda"
        self._spans: list[list[tuple[Any, Any]]] = []
        self._drafting: list[float] = []
        setattr(engine.runner, "forward", self._timed_forward)  # noqa: B010  # shadows the method on this one instance

    def begin_step(self) -> None:
        """What follows belongs to a new step."""
        self._spans.append([])
        self._drafting.append(self._draft_seconds())

    def costs(self) -> list[StepCosts]:
        """The steps since the last call."""
        if self._is_cuda:
            torch.cuda.synchronize(self._engine.runner.device)
        drafting = [*self._drafting[1:], self._draft_seconds()][: len(self._drafting)]
        costs = [
            StepCosts(sum(self._seconds(*span) for span in spans), after - before)
            for spans, before, after in zip(self._spans, self._drafting, drafting, strict=True)
        ]
        self._spans, self._drafting = [], []
        return costs

    def detach(self) -> None:
        """Leaves the engine as it was."""
        vars(self._engine.runner).pop("forward", None)

    def _draft_seconds(self) -> float:
        return sum(self._engine.chain.seconds.values())

    def _timed_forward(self, *args: Any, **kwargs: Any) -> Any:
        started = self._now()
        result = self._forward(*args, **kwargs)
        if self._spans:
            self._spans[-1].append((started, self._now()))
        return result

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, started: Any, ended: Any) -> float:
        return started.elapsed_time(ended) / 1e3 if self._is_cuda else ended - started
