"""The draft of one row, while it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from specplug_draft_model.sequence import DraftSequence

if TYPE_CHECKING:
    import torch

    from specplug import ProposalRow, UpcomingTokens


@attrs.define(eq=False)
class RowDraft:
    """The draft of one row.

    Attributes:
        row: the row.
        sequence: its state in the draft model's KV cache.
        max_tokens: the most tokens.
        stop: how many of the row's first tokens the draft model is to have processed.
        upcoming: tokens after those that it is to process, and the host does not know yet.
        tokens: target ids.
        last: the draft model's id of the last token.
        probs: the distribution of each token; empty for a deterministic draft.
        chances: how likely the chain is up to each token; empty for sampled tokens.
    """

    row: ProposalRow
    sequence: DraftSequence
    max_tokens: int
    stop: int
    upcoming: UpcomingTokens | None = None
    tokens: list[int] = attrs.field(factory=list)
    last: int = -1
    probs: list[torch.Tensor] = attrs.field(factory=list)
    chances: list[float] = attrs.field(factory=list)

    @property
    def num_new(self) -> int:
        """Tokens that it has to process; at most zero if there are none."""
        return self.stop - self.sequence.num_stored + (0 if self.upcoming is None else len(self.upcoming))
