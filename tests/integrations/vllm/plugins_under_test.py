"""Speculators that break in every way, and some that work; vLLM's process imports them by name."""

from __future__ import annotations

import time
from typing import Any

from specplug import MemoryRegion, Proposal, SpeculatorTraits, hookimpl

shown: list[tuple[int, bool, int]] = []
ended: list[tuple[int, str, list[int]]] = []


class Speculator:
    """Drafts what a function of the batch says."""

    def __init__(self, answer: Any, **traits: Any) -> None:
        self.answer = answer
        self.traits = SpeculatorTraits(**traits)

    @hookimpl
    def propose(self, batch: Any) -> Any:
        return self.answer(batch)


def raises(config: Any, target: Any) -> Any:
    def answer(batch: Any) -> Any:
        raise ZeroDivisionError("a bug in the plugin")

    return Speculator(answer, token_only=True)


def raises_late(config: Any, target: Any) -> Any:
    """Keeps state, as far as its traits say; fails in its second call alone, and repeats the last token in the others."""
    calls = iter(range(10**6))

    def answer(batch: Any) -> Any:
        if next(calls) == 1:
            raise ZeroDivisionError("a bug in the plugin")
        return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])

    return Speculator(answer)


def garbage(config: Any, target: Any) -> Any:
    answers = iter([7, Proposal([[10**9]] * 4), Proposal([[-1] * 3] * 99)])
    return Speculator(lambda batch: next(answers), token_only=True)


def exits(config: Any, target: Any) -> Any:
    def answer(batch: Any) -> Any:
        raise SystemExit(3)

    return Speculator(answer, token_only=True)


def hangs(config: Any, target: Any) -> Any:
    return Speculator(lambda batch: time.sleep(20))


def now_and_then(config: Any, target: Any) -> Any:
    """Fails in every third call, and repeats the last token in the others."""
    calls = iter(range(10**6))

    def answer(batch: Any) -> Any:
        if next(calls) % 3 == 0:
            raise ValueError("every third call")
        return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])

    return Speculator(answer, token_only=True)


class Watching:
    """Repeats the last token, and notes the rows that it is shown and told of; learns nothing, but says so."""

    traits = SpeculatorTraits(learns=True)

    def __init__(self) -> None:
        self.rows: dict[int, Any] = {}

    @hookimpl
    def propose(self, batch: Any) -> Any:
        for row_id, reason in batch.ended:
            ended.append((row_id, reason, list(self.rows.pop(row_id))))
        for row in batch.rows:
            assert row.is_new == (row.row_id not in self.rows), "a row began or went on unannounced"
            self.rows[row.row_id] = row.tokens
            shown.append((row.row_id, row.is_new, len(row.tokens)))
        return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])


def watching(config: Any, target: Any) -> Any:
    shown.clear()
    ended.clear()
    return Watching()


class Sharing(Watching):
    @hookimpl
    def plan_memory(self, budget: Any) -> list[MemoryRegion]:
        import torch

        from specplug import KVLayer

        return [MemoryRegion("kv", "kv_cache", layers=(KVLayer(1, 4, 4),), dtype=torch.float32)]


def sharing(config: Any, target: Any) -> Any:
    return Sharing()


class Verifying(Watching):
    @hookimpl
    def verify(self, batch: Any, proposal: Any, target: Any) -> Any:
        return None


def verifying(config: Any, target: Any) -> Any:
    return Verifying()


def reading(config: Any, target: Any) -> Any:
    return Speculator(lambda batch: None, hidden_states=["final"])
