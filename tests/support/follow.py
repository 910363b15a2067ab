"""A speculator that is always right about sequences it was told of."""

from __future__ import annotations

from specplug import Proposal, ProposalBatch, SpeculatorTraits, hookimpl


class Follow:
    """Drafts known continuations as far as it may.

    Attributes:
        known: whole sequences, prompt first.
    """

    traits = SpeculatorTraits(token_only=True)

    def __init__(self, known: list[list[int]]) -> None:
        self.known = known

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        drafts = []
        for row in batch.rows:
            tokens = list(row.tokens)
            match = next((each for each in self.known if each[: len(tokens)] == tokens), tokens)
            drafts.append(match[len(tokens) : len(tokens) + row.budget.max_nodes])
        return Proposal(drafts)
