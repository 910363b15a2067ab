"""What a speculator was really asked in a step."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from specplug.contract.types import ProposalBatch

SHORT_GAP = 16
"""Tokens that a row may be behind without its catching up being worth a mention."""


@attrs.frozen
class Asked:
    """One call of `propose` that went well; its drafts are in `request.draft`.

    Attributes:
        depths: request number → the deepest node it was allowed, or got, if its speculator may stop before. Rows that might not
            draft are left out.
        fed: tokens it had to take in beside those of the last step: prompts, and what rows missed while they slept.
        allowed: the deepest node that any row was allowed.
    """

    depths: Mapping[int, int]
    fed: int = 0
    allowed: int = 0

    @property
    def deepest(self) -> int:
        """The deepest of all rows; 0 where none might draft."""
        return max(self.depths.values(), default=0)


def fed_tokens(batch: ProposalBatch) -> int:
    """Tokens that a speculator with a state takes in beside those of the last step."""
    sizes = [(len(row.new_positions), row.budget.max_nodes) for row in batch.rows]
    return sum(size for size, nodes in sizes if size > SHORT_GAP or not nodes)
