"""The kit's own small speculator, under which observers are checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specplug.contract.hooks import hookimpl
from specplug.contract.types import Proposal, ProposalBatch, SpeculatorTraits

METHOD = "kit_lookup"


class Lookup:
    """Drafts what followed the last token before; where it is new, the last token again."""

    traits = SpeculatorTraits(token_only=True)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        """Drafts as much as it may."""
        return Proposal([self.draft(row.tokens[:], row.budget.max_nodes) for row in batch.rows])

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """The draft of one row."""
        for position in range(len(tokens) - 2, -1, -1):
            if tokens[position] == tokens[-1]:
                return list(tokens[position + 1 : position + 1 + count])
        return [tokens[-1]] * count


def load_lookup(config: Any, target: Any) -> Lookup:
    """Makes it."""
    return Lookup()
