"""A speculator around the plugin's own that records what it drafts, and accepts random paths of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import attrs

from specplug import (
    LLM,
    Budget,
    MemoryBudget,
    MemoryRegion,
    Proposal,
    ProposalBatch,
    Resources,
    Verdict,
    VerificationBatch,
    hookimpl,
)
from specplug_eagle import EagleSpeculator, load_speculator


@attrs.frozen(eq=False)
class Drafted:
    """One row's draft.

    Attributes:
        request: the row's running number.
        length: how many tokens were committed.
        begin: the first position that the head was shown in an unbroken run up to here.
        budget: what could be drafted.
        paths: the nodes as paths of tokens, in their order.
        scores: what was reported of them.
    """

    request: int
    length: int
    begin: int
    budget: Budget
    paths: list[tuple[int, ...]]
    scores: list[float]


class RandomWalk:
    """Drafts with the plugin; verifies by a random walk down each tree, and a random token behind it.

    Attributes:
        inner: the plugin's speculator.
        loops: whether it drafts as on a GPU, without looking at a token before the next one.
        drafts: everything that was drafted.
        tokens: each row's last known tokens, by the row's running number.
        depths: how deep each walk went.
    """

    def __init__(
        self, inner: EagleSpeculator, vocabulary: int, seed: int, go_on: float = 0.8, *, loops: bool = False
    ) -> None:
        self.inner = inner
        self.traits = inner.traits
        self.vocabulary = vocabulary
        self.random = random.Random(seed)
        self.go_on = go_on
        self.loops = loops
        self.drafts: list[Drafted] = []
        self.tokens: dict[int, list[int]] = {}
        self.depths: list[int] = []
        self.forks = 0
        self.gaps = 0
        self._engine: Any = None
        self._shown: dict[int, range] = {}
        self._parents: dict[int, int] = {}
        self.cached = 0

    def watch(self, llm: LLM) -> None:
        """Learns from the engine which request is behind a slot, and when one forks or ends."""
        self._engine = llm.engine
        chain = llm.engine.chain
        fork, end = chain.fork, chain.end

        def on_fork(parent: Any, child: Any) -> None:
            shown = self._shown.get(parent.number)
            if shown is not None:
                self._shown[child.number] = range(shown.start, min(shown.stop, child.num_forked_tokens))
                self._parents[child.number] = parent.number
            fork(parent, child)

        def on_end(request: Any, slot: int, reason: Any) -> None:
            self._shown.pop(request.number, None)
            self._parents.pop(request.number, None)
            for child, parent in list(self._parents.items()):
                if parent == request.number:  # nobody can say any more where its entries begin
                    del self._parents[child], self._shown[child]
            end(request, slot, reason)

        chain.fork, chain.end = on_fork, on_end

    @hookimpl
    def plan_memory(self, budget: MemoryBudget) -> list[MemoryRegion]:
        return self.inner.plan_memory(budget)

    @hookimpl
    def warmup(self, resources: Resources) -> None:
        self.inner.warmup(resources)
        if self.loops:
            self.inner.use_loop(resources)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        numbers = {request.slot: request.number for request in self._engine.scheduler.running}
        for row in batch.rows:
            number = numbers[row.row_id]
            shown = self._shown.get(number, range(0, 0))
            self._parents.pop(number, None)
            self.forks += row.forked_from is not None
            if row.num_cached_tokens:
                assert row.num_cached_tokens == row.new_positions.start
                shown = range(row.num_cached_tokens)
                self.cached += 1
            if row.new_positions.start != shown.stop:
                shown = range(row.new_positions.start, row.new_positions.start)
                self.gaps += 1
            self._shown[number] = range(shown.start, row.new_positions.stop)
            self.tokens[number] = list(row.tokens)
            if row.budget.max_nodes and self.random.random() < 0.3:
                nodes = self.random.randint(1, row.budget.max_nodes)
                row.budget = Budget(nodes, self.random.randint(1, min(nodes, row.budget.max_depth)))
        proposal = self.inner.propose(batch)
        assert proposal.parents is not None
        assert proposal.scores is not None
        for row, tokens, parents, scores in zip(
            batch.rows, proposal.tokens, proposal.parents, proposal.scores, strict=True
        ):
            if row.budget.max_nodes:
                number = numbers[row.row_id]
                paths = paths_of(tokens, parents)
                begin = self._shown[number].start
                self.drafts.append(Drafted(number, len(row.tokens), begin, row.budget, paths, list(scores or ())))
        return proposal

    @hookimpl
    def verify(self, batch: VerificationBatch, proposal: Proposal) -> Verdict:
        accepted, following = [], []
        assert proposal.parents is not None
        for tokens, parents in zip(proposal.tokens, proposal.parents, strict=True):
            own = list(range(-1, len(tokens) - 1)) if parents is None else list(parents)
            path: list[int] = []
            while self.random.random() < self.go_on:
                below = [node for node, parent in enumerate(own) if parent == (path[-1] if path else -1)]
                if not below:
                    break
                path.append(self.random.choice(below))
            accepted.append(path)
            following.append(self.random.randrange(self.vocabulary))
            self.depths.append(len(path))
        return Verdict(accepted, following)


def paths_of(tokens: Sequence[int], parents: Sequence[int] | None) -> list[tuple[int, ...]]:
    """Every node as the tokens that lead to it."""
    paths: list[tuple[int, ...]] = []
    for node, token in enumerate(tokens):
        parent = node - 1 if parents is None else parents[node]
        assert -1 <= parent < node
        paths.append((*(paths[parent] if parent >= 0 else ()), int(token)))
    return paths


def random_walk(
    vocabulary: int, seed: int, *, loops: bool = False, **keys: Any
) -> tuple[dict[str, Any], list[RandomWalk]]:
    """LLM options of a recorded head, and where its recorder will be."""
    made: list[RandomWalk] = []

    def make(config: Any, target: Any) -> RandomWalk:
        made.append(RandomWalk(load_speculator(config, target), vocabulary, seed, loops=loops))
        return made[-1]

    return {
        "plugins": {"walk": make},
        "speculative_config": {"method": "walk", "draft_sample_method": "greedy", **keys},
    }, made
