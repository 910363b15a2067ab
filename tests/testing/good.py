"""Small speculators that keep every promise: the base of the broken ones."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from specplug import (
    DraftDistributions,
    MemoryRegion,
    Proposal,
    SpeculatorTraits,
    hookimpl,
    sample,
)
from specplug.testing.lookup import Lookup

__all__ = ["Learner", "Lookup", "Reader", "Sampler", "StateLearner", "Table"]


class Learner:
    """Drafts what followed a pair of tokens in any request so far, and keeps all of it."""

    traits = SpeculatorTraits(learns=True)

    def __init__(self) -> None:
        self.followed: dict[tuple[int, int], int] = {}

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        for row in batch.rows:
            tokens = row.tokens[:]
            self.followed |= dict(zip(pairwise(tokens), tokens[2:], strict=False))
        return Proposal([self.draft(row.tokens[-2:], row.budget.max_nodes) for row in batch.rows])

    def draft(self, tokens: list[int], count: int) -> list[int]:
        drafted = list(tokens)
        while len(drafted) < count + len(tokens) and tuple(drafted[-2:]) in self.followed:
            drafted.append(self.followed[drafted[-2], drafted[-1]])
        return drafted[len(tokens) :]


class Sampler:
    """Samples chains from a table of bigrams, and reports what it samples from."""

    traits = SpeculatorTraits(token_only=True)

    def __init__(self, target: Any) -> None:
        generator = torch.Generator().manual_seed(8)
        self.table = (1.5 * torch.randn(target.vocab_size, target.vocab_size, generator=generator)).softmax(dim=-1)

    @hookimpl
    def plan_memory(self, budget: Any) -> list[MemoryRegion]:
        return [MemoryRegion("table", "buffers", fixed_bytes=self.table.nbytes)]

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        drafts = [self.draft(row) for row in batch.rows]
        return Proposal([tokens for tokens, _ in drafts], probs=[probs for _, probs in drafts])

    def draft(self, row: Any) -> tuple[list[int], Any]:
        tokens: list[int] = [row.tokens[-1]]
        probs = []
        for _ in range(min(row.budget.max_nodes, row.budget.max_depth)):
            distribution = self.table[tokens[-1]]
            probs.append(self.report(distribution))
            tokens.append(self.draw(row, distribution))
        if not probs or self.is_greedy(row):
            return tokens[1:], None
        return tokens[1:], DraftDistributions(torch.stack(probs))

    def is_greedy(self, row: Any) -> bool:
        return row.sampling.greedy

    def draw(self, row: Any, distribution: torch.Tensor) -> int:
        if row.sampling.greedy:
            return int(distribution.argmax())
        return int(sample(distribution[None], [row.generator])[0, 0])

    def report(self, distribution: torch.Tensor) -> torch.Tensor:
        return distribution


class Reader:
    """Drafts from the target's hidden states: the newest of a row, and a fading memory of its older ones."""

    traits = SpeculatorTraits(hidden_states=(1, "final"))

    def __init__(self, target: Any) -> None:
        generator = torch.Generator().manual_seed(9)
        self.weights = torch.randn(2, target.hidden_size, target.vocab_size, generator=generator)
        self.memories: dict[int, torch.Tensor] = {}
        self.newest: dict[int, torch.Tensor] = {}

    @hookimpl
    def plan_memory(self, budget: Any) -> list[MemoryRegion]:
        rows = 2 * budget.max_num_seqs * self.weights.shape[1] * 4
        return [MemoryRegion("weights and memories", "buffers", fixed_bytes=self.weights.nbytes + rows)]

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        for row_id, _ in batch.ended:
            self.forget(row_id)
        return Proposal([self.draft(row, batch) for row in batch.rows])

    def forget(self, row_id: int) -> None:
        self.memories.pop(row_id, None)
        self.newest.pop(row_id, None)

    def begin(self, row: Any) -> None:
        self.memories[row.row_id] = torch.zeros(self.weights.shape[1])

    def draft(self, row: Any, batch: Any) -> list[int]:
        if row.is_new:
            self.begin(row)
        for place in range(row.new_states.start, row.new_states.stop):
            self.memories[row.row_id] = 0.7 * self.memories[row.row_id] + batch.hidden_states[1][place]
        if len(row.new_positions):
            self.newest[row.row_id] = self.newest_state(row, batch).clone()
        count = min(row.budget.max_nodes, row.budget.max_depth)
        scores = self.newest[row.row_id] @ self.weights[0] + self.memories[row.row_id] @ self.weights[1]
        return scores.topk(count).indices.tolist()

    def newest_state(self, row: Any, batch: Any) -> torch.Tensor:
        return batch.hidden_states["final"][row.new_states.stop - 1]


class StateLearner:
    """Drafts what the target's states said would follow a token when it was last seen, in any request."""

    traits = SpeculatorTraits(hidden_states=("final",), learns=True)

    def __init__(self, target: Any) -> None:
        generator = torch.Generator().manual_seed(10)
        self.weights = torch.randn(target.hidden_size, target.vocab_size, generator=generator)
        self.follows: dict[int, int] = {}

    @hookimpl
    def plan_memory(self, budget: Any) -> list[MemoryRegion]:
        return [MemoryRegion("weights", "buffers", fixed_bytes=self.weights.nbytes)]

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        for row in batch.rows:
            for index, position in enumerate(row.new_positions):
                state = batch.hidden_states["final"][self.place(row.new_states.start, index)]
                self.follows[row.tokens[position]] = int((state @ self.weights).argmax())
        return Proposal([self.draft(row.tokens[-1], row.budget.max_nodes) for row in batch.rows])

    def place(self, start: int, index: int) -> int:
        return start + index

    def draft(self, token: int, count: int) -> list[int]:
        drafted = [token]
        while len(drafted) <= count and drafted[-1] in self.follows:
            drafted.append(self.follows[drafted[-1]])
        return drafted[1:]


class Table(Lookup):
    """Looks up, and holds a buffer that it plans."""

    size = 1 << 20

    @hookimpl
    def plan_memory(self, budget: Any) -> list[MemoryRegion]:
        return [MemoryRegion("table", "buffers", fixed_bytes=self.size)]

    @hookimpl
    def warmup(self, resources: Any) -> None:
        self.table = torch.zeros(self.size, dtype=torch.uint8)
