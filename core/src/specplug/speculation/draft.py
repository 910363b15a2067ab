"""One row's draft inside the engine: checked, and in a single form for chains and trees."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from specplug.contract.types import DraftDistributions
from specplug.model.pending import PendingRow
from specplug.plugins.registry import RegisteredSpeculator


@attrs.define(eq=False)
class Draft:
    """A checked draft of one row.

    Attributes:
        method: who proposed it.
        tokens: target ids of the nodes, parents before children. If they are still on the device, the first look at them
            waits for them.
        parents: each node's parent, -1 for the root; None for a chain.
        scores: scores of a deterministic tree's nodes, or None.
        probs: what the nodes were drawn from, or None for a deterministic draft.
        speculator: the proposer in the chain of speculators; a method may occur in it twice.
        allowed: the most nodes that it was asked for.
        proposed: the nodes that it had before any were cut.
    """

    method: str
    _tokens: list[int] | PendingRow
    parents: list[int] | None = None
    scores: list[float] | None = None
    probs: DraftDistributions | None = None
    speculator: RegisteredSpeculator | None = attrs.field(default=None, repr=False)
    allowed: int = 0
    proposed: int = 0

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> list[int]:
        """See above."""
        if isinstance(self._tokens, PendingRow):
            self._tokens = self._tokens.read()
        return self._tokens

    @property
    def pending(self) -> PendingRow | None:
        """The tokens, if the host has not read them yet."""
        return self._tokens if isinstance(self._tokens, PendingRow) else None

    @property
    def is_unread(self) -> bool:
        """Whether the tokens are on the device alone."""
        pending = self.pending
        return pending is not None and pending.ids is None

    @property
    def input_ids(self) -> Sequence[int]:
        """What a forward is given: the ids, or placeholders for those that are still on the device (`PendingTokens`)."""
        pending = self.pending
        return self.tokens if pending is None or pending.ids is not None else pending.placeholders

    @property
    def is_scored_chain(self) -> bool:
        """Whether its speculator knew how likely each token was, and could stop where another would not have paid."""
        return self.scores is not None and self.parents is None

    @property
    def stopped(self) -> bool:
        """Whether it is shorter than it might be, because its speculator stopped."""
        return self.is_scored_chain and self.proposed < self.allowed

    def parent_list(self) -> list[int]:
        """Each node's parent, chains included."""
        return list(range(-1, len(self) - 1)) if self.parents is None else self.parents

    def best_chain(self) -> Draft:
        """The path from the root that is expected to be accepted furthest, for an engine that verifies chains only.

        With scores, which are taken for cumulative log-probabilities, it is the path with the most expected tokens; else the
        deepest one, of those the first. Of a sampled tree it is the path of first children: they were drawn from the
        distributions themselves, their siblings from what was left of them.
        """
        if self.parents is None or not len(self):
            return self
        if self.probs is not None:
            path = self._first_children()
        else:
            gains: list[float] = []
            for node, parent in enumerate(self.parents):
                own = 1.0 if self.scores is None else math.exp(min(0.0, self.scores[node]))
                gains.append(own + (gains[parent] if parent >= 0 else 0.0))
            node, path = max(range(len(gains)), key=lambda index: (gains[index], -index)), []
            while node >= 0:
                path.append(node)
                node = self.parents[node]
            path.reverse()
        return attrs.evolve(self.keep(path), parents=None)

    def _first_children(self) -> list[int]:
        path: list[int] = []
        for node, parent in enumerate(self.parent_list()):
            if parent == (path[-1] if path else -1):
                path.append(node)
        return path

    def keep(self, nodes: Sequence[int]) -> Draft:
        """The draft of an ancestor-closed subset of nodes, given in ascending order."""
        if len(nodes) == len(self):
            return self
        new_index = {-1: -1, **{old: new for new, old in enumerate(nodes)}}
        parents = self.parent_list()
        probs = self.probs
        if probs is not None:
            index = probs.index or range(len(self.tokens))
            probs = attrs.evolve(probs, index=[index[node] for node in nodes])
        return Draft(
            method=self.method,
            tokens=[self.tokens[node] for node in nodes],
            parents=None if self.parents is None else [new_index[parents[node]] for node in nodes],
            scores=None if self.scores is None else [self.scores[node] for node in nodes],
            probs=probs,
            speculator=self.speculator,
            allowed=self.allowed,
            proposed=self.proposed,
        )


def depths_of(parents: Sequence[int]) -> list[int]:
    """The depth of each node, parents given before their children."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return depths


def trim_drafts(drafts: Sequence[Draft | None], total: int, turn: int = 0) -> list[Draft | None]:
    """Keeps at most `total` nodes over all rows.

    Deterministic trees with scores keep the best nodes of all rows together, which are ancestor-closed. Other drafts keep their
    first nodes, up to an equal share of the total; what is left over goes to some of them, beginning at another one every
    `turn`, so that a total below the number of rows is used too. Which nodes go must not depend on the tokens that were
    sampled, nor on how many came in any row, since a speculator may stop where it is unsure. So next to a sampled draft all
    count for what they were allowed.
    """
    present = [draft for draft in drafts if draft is not None]
    count = len(present)
    is_any_sampled = any(draft.probs is not None for draft in present)
    if sum(max(draft.allowed, len(draft)) if is_any_sampled else len(draft) for draft in present) <= total:
        return list(drafts)
    share, left = divmod(max(0, total), count)
    shares = iter([share + ((place - turn) % count < left) for place in range(count)])
    cut: list[Draft | None] = []
    for draft in drafts:
        own = 0 if draft is None else next(shares)
        cut.append(draft.keep(range(own)) if draft is not None and draft.scores is None and len(draft) > own else draft)
    fixed = sum(len(draft) for draft in cut if draft is not None and draft.scores is None)
    scored = [
        (-score, row, node)
        for row, draft in enumerate(cut)
        if draft is not None and draft.scores is not None
        for node, score in enumerate(draft.scores)
    ]
    kept: dict[int, list[int]] = {}
    for _, row, node in sorted(scored)[: max(0, total - fixed)]:
        kept.setdefault(row, []).append(node)
    return [
        draft if draft is None or draft.scores is None else draft.keep(sorted(kept.get(row, [])))
        for row, draft in enumerate(cut)
    ]
