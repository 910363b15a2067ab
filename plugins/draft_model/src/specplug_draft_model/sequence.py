"""What the draft model's KV cache holds of one row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from specplug import ProposalRow


@attrs.define
class DraftSequence:
    """How far a row's KV is right, so that every committed token is processed once and none is left out.

    Attributes:
        num_stored: the row's first tokens, whose KV is in the draft's cache.
        num_speculative: draft tokens behind them that were run too: as many of them as the target accepts are right.
    """

    num_stored: int = 0
    num_speculative: int = 0

    @classmethod
    def begin(cls, row: ProposalRow) -> DraftSequence:
        """A row that is new: a fork shares what was stored before it, any other has nothing."""
        return cls(0 if row.forked_from is None else row.new_positions.start)

    def settle(self, row: ProposalRow, method: str) -> None:
        """Counts the draft tokens that became the row's own; their KV stays."""
        if row.outcome is not None and row.outcome.method == method:
            self.num_stored += min(len(row.outcome.accepted), self.num_speculative)
        self.num_speculative = 0
