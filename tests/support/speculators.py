"""Three throwaway speculators that exercise every part of the contract."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from specplug import (
    DraftDistributions,
    ForwardRow,
    MemoryBudget,
    MemoryRegion,
    Proposal,
    ProposalBatch,
    ProposalRow,
    Resources,
    SpeculatorTraits,
    hookimpl,
    process,
)


class Oracle:
    """Knows reference continuations, and gets them wrong now and then."""

    def __init__(self, known: list[list[int]], vocabulary: int, hit_rate: float = 0.7, seed: int = 0) -> None:
        self.known = known
        self.vocabulary = vocabulary
        self.hit_rate = hit_rate
        self.random = random.Random(seed)

    def next(self, tokens: list[int]) -> int:
        """A guess at the next token."""
        if self.random.random() < self.hit_rate:
            for sequence in self.known:
                if len(sequence) > len(tokens) and sequence[: len(tokens)] == tokens:
                    return sequence[len(tokens)]
        return self.random.randrange(self.vocabulary)


class TokenSpeculator:
    """Token ids in, chains of random length out."""

    traits = SpeculatorTraits(token_only=True)

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        drafts = []
        for row in batch.rows:
            tokens = list(row.tokens)
            for _ in range(self.oracle.random.randint(0, min(row.budget.max_nodes, row.budget.max_depth))):
                tokens.append(self.oracle.next(tokens))
            drafts.append(tokens[len(row.tokens) :])
        return Proposal(drafts)


class ModelSpeculator:
    """A small model with KV in the target's block tables; drafts are sampled and reported with their distributions."""

    def __init__(self, target: Any, folder: Path, gamma: int) -> None:
        self.model = target.model(str(folder))
        self.gamma = gamma
        self.seen: dict[int, int] = {}

    @hookimpl
    def plan_memory(self, budget: MemoryBudget) -> list[MemoryRegion]:
        return self.model.regions(scratch_tokens_per_row=self.gamma)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        for row_id, _ in batch.ended:
            self.seen.pop(row_id, None)
        drafting = [row.budget.max_nodes > 0 for row in batch.rows]
        catch_up = []
        for row, drafts in zip(batch.rows, drafting, strict=True):
            if row.is_new:
                self.seen[row.row_id] = self.begin(row)
            start = self.seen[row.row_id]
            stop = len(row.tokens) if drafts else self.stop_without_draft(row, start)
            catch_up.append(ForwardRow(row.tokens[start:stop], start, row.table))
            self.seen[row.row_id] = stop
        run = [index for index, forward in enumerate(catch_up) if forward.tokens]
        logits = dict(zip(run, self.model.forward([catch_up[i] for i in run]), strict=True)) if run else {}
        tokens: list[list[int]] = [[] for _ in batch.rows]
        probs: list[list[torch.Tensor]] = [[] for _ in batch.rows]
        active = [i for i, drafts in enumerate(drafting) if drafts]
        while active:
            for index in active:
                row = batch.rows[index]
                tokens[index].append(self._draw(row, logits[index], probs[index]))
            active = [i for i in active if len(tokens[i]) < min(batch.rows[i].budget.max_depth, self.gamma)]
            if active:
                rows = [
                    ForwardRow(tokens[i][-1:], len(batch.rows[i].tokens) + len(tokens[i]) - 1, batch.rows[i].table)
                    for i in active
                ]
                logits = dict(zip(active, self.model.forward(rows), strict=True))
        return Proposal(tokens, probs=[DraftDistributions(torch.stack(p)) if p else None for p in probs])

    def begin(self, row: ProposalRow) -> int:
        """How many entries a new row has. It knows of forks, and nothing of the prefix cache."""
        return 0 if row.forked_from is None else row.new_positions.start

    def stop_without_draft(self, row: ProposalRow, start: int) -> int:
        """How many a row has after a call in which it may not draft."""
        return row.new_positions.stop

    @staticmethod
    def _draw(row: ProposalRow, logits: torch.Tensor, probs: list[torch.Tensor]) -> int:
        if row.sampling.greedy:
            token = int(logits.argmax())
            probs.append(torch.nn.functional.one_hot(torch.tensor(token), logits.shape[-1]).float())
            return token
        distribution = process(logits[None], [row.sampling])[0]
        probs.append(distribution)
        return int(torch.multinomial(distribution, 1, generator=row.generator))


class TreeSpeculator:
    """Taps hidden states at several boundaries and proposes random scored trees."""

    def __init__(self, oracle: Oracle, boundaries: tuple[Any, ...], max_nodes: int, top_k: int = 0) -> None:
        self.oracle = oracle
        self.traits = SpeculatorTraits(hidden_states=boundaries, top_k=top_k, max_nodes=max_nodes)
        self.states: dict[int, dict[Any, dict[int, torch.Tensor]]] = {}
        self.histories: list[tuple[list[int], dict[Any, dict[int, torch.Tensor]]]] = []
        self.live: dict[int, Any] = {}

    @hookimpl
    def warmup(self, resources: Resources) -> None:
        assert set(resources.hidden_states) == set(self.traits.hidden_states)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        for row_id, _ in batch.ended:
            self.histories.append((list(self.live.pop(row_id)), self.states.pop(row_id)))
        for row in batch.rows:
            if row.is_new:
                assert row.row_id not in self.states, "a row_id was reused before its end was announced"
                self.states[row.row_id] = {channel: {} for channel in (*self.traits.hidden_states, "top_ids")}
            self.live[row.row_id] = row.tokens
            place = range(row.new_states.start, row.new_states.stop)
            assert len(place) == len(row.new_positions)
            for boundary, states in batch.hidden_states.items():
                for position, index in zip(row.new_positions, place, strict=True):
                    kept = self.states[row.row_id][boundary]
                    assert position not in kept, "a position was shown twice"
                    kept[position] = states[index].clone()
            if batch.top_ids is not None:
                for position, index in zip(row.new_positions, place, strict=True):
                    self.states[row.row_id]["top_ids"][position] = batch.top_ids[index].clone()
        trees = [self._tree(row) for row in batch.rows]
        return Proposal(
            tokens=[tree[0] for tree in trees], parents=[tree[1] for tree in trees], scores=[tree[2] for tree in trees]
        )

    def _tree(self, row: ProposalRow) -> tuple[list[int], list[int], list[float]]:
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        paths: list[list[int]] = []
        if row.budget.max_nodes == 0:
            return tokens, parents, scores
        choose = self.oracle.random
        for node in range(choose.randint(0, row.budget.max_nodes)):
            parent = choose.randint(-1, node - 1) if choose.random() < 0.5 else node - 1
            path = list(row.tokens) if parent < 0 else paths[parent]
            if len(path) - len(row.tokens) >= row.budget.max_depth:
                parent, path = -1, list(row.tokens)
            token = self.oracle.next(path)
            paths.append([*path, token])
            tokens.append(token)
            parents.append(parent)
            scores.append((0.0 if parent < 0 else scores[parent]) - choose.random())
        return tokens, parents, scores


def provide(
    make: Callable[[Any, Any], Any], method: str = "throwaway", gamma: int = 4, **options: Any
) -> dict[str, Any]:
    """LLM options that run a speculator which is not installed."""
    return {
        "plugins": {method: make},
        "speculative_config": {"method": method, "num_speculative_tokens": gamma, **options},
    }
