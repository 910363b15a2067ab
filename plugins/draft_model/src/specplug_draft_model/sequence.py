"""The state of one row in the draft model's KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from specplug import ModelHandle, ProposalRow


@attrs.define
class DraftSequence:
    """How much of a row's KV is valid, so that every committed token is processed exactly once.

    Attributes:
        num_stored: how many of the row's first tokens have valid KV.
        num_speculative: how many draft tokens after them have KV; it is valid for those that the target accepts.
        was_early: whether it also has that of tokens that were not known, and came before those: the row's next positions say
            how many.
    """

    num_stored: int = 0
    num_speculative: int = 0
    was_early: bool = False

    @classmethod
    def begin(cls, row: ProposalRow, model: ModelHandle) -> DraftSequence:
        """The state of a new row: a fork shares its parent's KV, a row may have some in the prefix cache, another has none."""
        stored = row.num_cached_tokens if row.forked_from is None else row.new_positions.start
        return cls(model.begin(row.row_id, stored, row.forked_from))

    def settle(self, row: ProposalRow, method: str) -> None:
        """Counts the draft tokens that were accepted: their KV is valid."""
        if self.was_early:
            self.num_stored = row.new_positions.start + 1
            self.was_early = False
        if row.upcoming is None and row.outcome is not None and row.outcome.method == method:
            self.num_stored += min(len(row.outcome.accepted), self.num_speculative)
        self.num_speculative = 0
