"""The draft of one row."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from specplug import DraftDistributions


@attrs.frozen(eq=False)
class TreeDraft:
    """Nodes with parents before children; see `specplug.Proposal`.

    Attributes:
        tokens: target ids.
        parents: each node's parent, -1 for the root; None for a chain.
        scores: cumulative log-probability of each node, for a deterministic draft.
        probs: the distributions that a sampled draft was sampled from.
    """

    tokens: list[int]
    parents: list[int] | None = None
    scores: list[float] | None = None
    probs: DraftDistributions | None = None


EMPTY = TreeDraft([])


def best_nodes(scores: Sequence[float], count: int) -> list[int]:
    """The `count` best nodes in ascending order. Of equal scores the earlier node is taken, so a parent before its child."""
    if len(scores) <= count:
        return list(range(len(scores)))
    return sorted(sorted(range(len(scores)), key=lambda node: (-scores[node], node))[:count])


def renumber(parents: Sequence[int], kept: Sequence[int]) -> list[int]:
    """The parents of the kept nodes, as indices of the kept nodes."""
    place = {-1: -1, **{node: index for index, node in enumerate(kept)}}
    return [place[parents[node]] for node in kept]
