"""A proposal that was made before the host knew what verification accepted."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug.contract.types import Budget, Proposal, ProposalBatch
from specplug.errors import PluginError
from specplug.speculation.draft import Draft
from specplug.speculation.link import ChainLink
from specplug.speculation.row import Row
from specplug.speculation.validation import lengths_of


@attrs.define(eq=False)
class EarlyProposal:
    """See above.

    Attributes:
        link: who made it.
        requests: the rows that it is for.
        lengths: what the policy allowed each.
        batch: what was asked; None if that was nothing.
        proposal: chains in a tensor; None if the speculator failed, or had none.
    """

    link: ChainLink
    requests: list[Row]
    lengths: list[int | Budget]
    batch: ProposalBatch | None = None
    proposal: Proposal | None = None

    def left(self, requests: Sequence[Row]) -> tuple[list[Row], list[int | Budget]]:
        """Those of some rows that it is for and that its speculator may still draft for, and their lengths."""
        numbers = {request.number for request in requests}
        kept = [
            (request, length)
            for request, length in zip(self.requests, self.lengths, strict=True)
            if request.number in numbers and request.number not in self.link.banned
        ]
        return [request for request, _ in kept], [length for _, length in kept]

    def cut(self, requests: Sequence[Row], budgets: Sequence[Budget]) -> tuple[Proposal | None, list[Budget]]:
        """What is left of it by the budgets that some of its rows have by now, and its own budgets."""
        own = [] if self.batch is None else [row.budget for row in self.batch.rows]
        if self.proposal is None:
            return None, own
        most = {
            request.number: min(budget.max_nodes, budget.max_depth)
            for request, budget in zip(requests, budgets, strict=True)
        }
        lengths = [
            min(length, most.get(request.number, 0))
            for request, length in zip(self.requests, lengths_of(self.proposal, self.proposal.tokens), strict=True)
        ]
        return attrs.evolve(self.proposal, lengths=lengths), own

    def pick(self, requests: Sequence[Row], drafts: Sequence[Draft | None]) -> list[Draft | None]:
        """The drafts of some of its rows."""
        of = {request.number: draft for request, draft in zip(self.requests, drafts, strict=True)}
        return [of.get(request.number) for request in requests]


def check_early(proposal: Proposal | None, budgets: Sequence[Budget]) -> Proposal | None:
    """Checks that a proposal is one of chains in a tensor, within budgets.

    Raises:
        PluginError: it is not; the message says what it is.
    """
    if proposal is None:
        return None
    if not isinstance(proposal, Proposal):
        raise PluginError(f"propose returned {type(proposal).__name__}, expected a Proposal or None")
    tokens = proposal.tokens
    if not isinstance(tokens, torch.Tensor) or proposal.parents or proposal.scores or proposal.probs:
        raise PluginError(
            f"propose was called with upcoming tokens and returned {type(tokens).__name__}, expected chains in a tensor "
            "[rows, K], without parents, scores and probs"
        )
    if len(tokens) != len(budgets):
        raise PluginError(f"propose returned {len(tokens)} rows for a batch of {len(budgets)}")
    for row, (length, budget) in enumerate(zip(lengths_of(proposal, tokens), budgets, strict=True)):
        if length > min(budget.max_nodes, budget.max_depth):
            raise PluginError(
                f"row {row}: a chain of {length} tokens, the budget is {budget.max_nodes}, {budget.max_depth} deep"
            )
    return proposal
