"""What was proposed for one row, in one form for chains and trees."""

from __future__ import annotations

from functools import cached_property

import attrs
import torch

from specplug.contract.types import Budget, DraftDistributions, Proposal
from specplug.sampling.params import SamplingParams
from specplug.speculation.draft import depths_of

Path = tuple[int, ...]


@attrs.define(eq=False, slots=False)
class RowDraft:
    """One row's draft.

    Attributes:
        tokens: ids of the nodes.
        parents: each node's parent, -1 for the root.
        values: [nodes, vocabulary], what each node is said to be drawn from; None for a deterministic draft.
    """

    tokens: list[int]
    parents: list[int]
    values: torch.Tensor | None = None

    @cached_property
    def paths(self) -> list[Path]:
        """Every node as the tokens that lead to it."""
        paths: list[Path] = []
        for token, parent in zip(self.tokens, self.parents, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        return paths

    @property
    def depth(self) -> int:
        """The deepest node's."""
        return max(depths_of(self.parents), default=0)

    @property
    def branches(self) -> bool:
        """Whether two nodes have the same parent."""
        return len(set(self.parents)) < len(self.parents)

    def distributions(self) -> dict[Path, torch.Tensor]:
        """What was reported, by the tokens behind which it was drawn."""
        if self.values is None:
            return {}
        return {path[:-1]: self.values[node] for node, path in enumerate(self.paths)}


@attrs.frozen(eq=False)
class DraftRecord:
    """A draft, and the row it was made for.

    Attributes:
        number: the request's running number.
        tokens: the committed tokens then.
        begin: the first position that the speculator was shown without a gap up to here.
        forked: whether the row began as a fork.
        budget: what might be drafted.
        params: the request's sampling parameters.
        draft: what was drafted.
    """

    number: int
    tokens: list[int]
    begin: int
    forked: bool
    budget: Budget
    params: SamplingParams
    draft: RowDraft


def row_drafts(proposal: Proposal | None, count: int, vocabulary: int) -> list[RowDraft]:
    """A proposal row by row, as it was returned: nothing is checked."""
    if proposal is None:
        return [RowDraft([], []) for _ in range(count)]
    drafts = []
    for row in range(count):
        tokens = _tokens(proposal, row)
        parents = None if proposal.parents is None else proposal.parents[row]
        probs = None if proposal.probs is None else proposal.probs[row]
        listed = list(range(-1, len(tokens) - 1)) if parents is None else [int(parent) for parent in parents]
        drafts.append(RowDraft(tokens, listed, None if probs is None else _spread(probs, len(tokens), vocabulary)))
    return drafts


def _tokens(proposal: Proposal, row: int) -> list[int]:
    tokens = proposal.tokens[row]
    listed = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
    return listed if proposal.lengths is None else listed[: proposal.lengths[row]]


def _spread(probs: DraftDistributions, nodes: int, vocabulary: int) -> torch.Tensor:
    index = list(range(nodes)) if probs.index is None else [int(i) for i in probs.index]
    values = probs.values.detach().float().cpu()[index].clone()
    if probs.token_ids is None:
        return values
    full = torch.zeros(len(values), vocabulary)
    return full.index_add_(1, probs.token_ids.cpu(), values)
