"""One sequence of a host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from specplug.contract.types import Outcome, TokenView
from specplug.host.tokens import ArrayTokens
from specplug.sampling.params import SamplingParams
from specplug.sampling.randomness import RowRandomness
from specplug.speculation.draft import Draft
from specplug.stats import SpeculationStats

if TYPE_CHECKING:
    from specplug.model.kv_cache import BlockTable


@attrs.define(eq=False)
class HostRow:
    """One running sequence of a host; `SpeculatorHost.add` makes it.

    Attributes:
        number: its consecutive number in its host.
        slot: the `row_id` that speculators see; free again after `SpeculatorHost.end`.
        view: its committed tokens.
        num_prompt_tokens: how many of them are the prompt.
        params: its sampling parameters.
        randomness: its random streams.
        num_computed: positions whose target states are final: all but the last token while it decodes.
        draft: what was last drafted for it.
        outcome: what became of that, until the next call of `propose`.
        stats: its speculation counters.
        total: those of its host.
    """

    number: int
    slot: int
    view: TokenView
    num_prompt_tokens: int
    params: SamplingParams
    randomness: RowRandomness
    num_computed: int
    draft: Draft | None = None
    outcome: Outcome | None = None
    stats: SpeculationStats = attrs.field(factory=SpeculationStats)
    total: SpeculationStats = attrs.field(factory=SpeculationStats, repr=False)
    table: BlockTable | None = None
    forked_from: int | None = None
    num_forked_tokens: int = 0
    stored_by: dict[int, int] = attrs.field(factory=dict)
    is_traced: bool = False

    @property
    def tokens(self) -> TokenView:
        """Its committed tokens."""
        return self.view

    @property
    def num_output_tokens(self) -> int:
        """Tokens after the prompt."""
        return len(self.view) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Committed tokens without target states: one while it decodes."""
        return len(self.view) - self.num_computed

    def advance(self, num_tokens: int, accepted: int | Sequence[int] = 0, *, num_computed: int | None = None) -> None:
        """Notes a step of the target, once the row's tokens are what they are after it.

        Args:
            num_tokens: how many tokens are committed now. A view of an array gets this length.
            accepted: what was accepted of `draft`: how many nodes of a chain, or the indices of a tree's path.
            num_computed: how many of the first positions have final target states; None for all but the last.
        """
        if isinstance(self.view, ArrayTokens):
            self.view.length = num_tokens
        self.num_computed = num_tokens - 1 if num_computed is None else num_computed
        draft, self.draft = self.draft, None
        path = tuple(range(accepted)) if isinstance(accepted, int) else tuple(accepted)
        self.outcome = None if draft is None else Outcome(draft.method, len(draft), path, tuple(draft.tokens))
        for stats in (self.stats, self.total):
            stats.record(0 if draft is None else len(draft), len(path), "" if draft is None else draft.method)
