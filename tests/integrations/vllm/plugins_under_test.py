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


class Checking:
    """Compares every state with the row's tokens, which the target chose greedily; repeats the last token.

    The state after layer 0's input is an embedding; the most likely token after a position of the output is the next one;
    the head over the final state gives the same; and the most likely token after an accepted node follows it.
    """

    traits = SpeculatorTraits(hidden_states=(0, 5, "final"), top_k=3, top_k_at_drafts=True)

    def __init__(self, target: Any) -> None:
        self.target = target
        self.seen: dict[int, int] = {}
        self.starts: list[int] = []
        self.positions = 0
        self.nodes = 0

    @hookimpl
    def propose(self, batch: Any) -> Any:
        import torch

        for row_id, _ in batch.ended:
            del self.seen[row_id]
        for row in batch.rows:
            span = row.new_positions
            assert row.is_new == (row.row_id not in self.seen)
            if row.is_new:
                self.starts.append(span.start)
            assert len(span) > 0
            assert span.start == self.seen.get(row.row_id, span.start)
            self.seen[row.row_id] = span.stop
            tokens = list(row.tokens)
            ids = torch.tensor(tokens[span.start : span.stop])
            torch.testing.assert_close(batch.hidden_states[0][row.new_states], self.target.embed(ids))
            assert batch.hidden_states[5][row.new_states].abs().sum(dim=-1).min() > 0
            top, probs = batch.top_ids[row.new_states], batch.top_probs[row.new_states]
            own = self.target.logits(batch.hidden_states["final"][row.new_states]).float().softmax(dim=-1).topk(3)
            torch.testing.assert_close(probs, own.values)
            assert len(top) == len(span)
            for position, likely in zip(span, top[:, 0].tolist(), strict=True):
                if row.num_prompt_tokens - 1 <= position < len(tokens) - 1:
                    assert likely == tokens[position + 1]
                    self.positions += 1
            if row.outcome is not None:
                nodes = batch.drafted_top_ids[row.drafted][:, 0].tolist()
                assert len(nodes) == row.outcome.num_nodes
                path, end = row.outcome.accepted, span.stop - len(row.outcome.accepted)
                assert [nodes[node] for node in path] == tokens[end + 1 : span.stop + 1]
                self.nodes += len(nodes)
        return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])


def checking(config: Any, target: Any) -> Any:
    return Checking(target)


def raises_with_states(config: Any, target: Any) -> Any:
    def answer(batch: Any) -> Any:
        raise ZeroDivisionError("a bug in the plugin")

    return Speculator(answer, hidden_states=(2, "final"))
