"""What a speculator proposes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch


@attrs.define(eq=False)
class DraftDistributions:
    """The distributions a row's nodes were drawn from.

    Attributes:
        values: float32 [M, draft vocabulary]: normalised distributions, exactly those that were sampled from,
            temperature and truncation included. A numpy array is taken as well, as it is for `token_ids`.
        index: for each node, the row of `values` that it was drawn from at its parent. Siblings name the same row: they
            were drawn without replacement, in node order. None: node i was drawn from row i.
        token_ids: int64 [draft vocabulary]: the target id of each draft id. None: draft ids are target ids.
    """

    values: torch.Tensor
    index: Sequence[int] | None = None
    token_ids: torch.Tensor | None = None


@attrs.define(eq=False)
class Proposal:
    """Draft tokens for every row of a batch, in its order. An empty row is always legal.

    A row is a chain, or with `parents` a tree, whose root (the last committed token) is not a node. A row without `probs`
    is *deterministic*: its nodes were chosen without looking at this row's verification randomness, which is all that
    lossless verification needs. A row with `probs` was *sampled*, and is accepted by rejection sampling. A node may be
    left out only by what was known before it was drawn, never by the token that came out.

    Integers may be those of numpy, and a row's ids, parents and scores an array or tensor.

    Attributes:
        tokens: per row the target token ids of its nodes; or an integer tensor [rows, K], alone or with `lengths`. One
            without elements, as a call without rows gives it, may have any dtype.
        parents: per row (or None for a chain) each node's parent as an index of nodes, -1 for the root; parents come
            before their children.
        scores: per row (or None) a score for each node of a deterministic chain or tree, non-increasing along a path, by
            which core may keep the best ancestor-closed part when the batch is large. Rows are compared with each other:
            cumulative log-probabilities, in nats, are what it is made for.
        probs: per row (or None) the distributions the nodes were drawn from.
        lengths: how many of the tokens of each row count, where rows are filled up to the same length; so many of its
            parents and scores count too.
    """

    tokens: Sequence[Sequence[int]] | torch.Tensor
    parents: Sequence[Sequence[int] | None] | None = None
    scores: Sequence[Sequence[float] | None] | None = None
    probs: Sequence[DraftDistributions | None] | None = None
    lengths: Sequence[int] | None = None
