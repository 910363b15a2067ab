"""Speculation counters of a request or an engine."""

from __future__ import annotations

import attrs


@attrs.define
class DraftCounts:
    """Counts of one method's draft tokens.

    Attributes:
        num_draft_tokens: draft nodes verified.
        num_accepted_draft_tokens: draft nodes accepted.
    """

    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0


@attrs.define
class SpeculationStats:
    """Speculation counters of one request or one engine.

    Attributes:
        num_steps: target forwards that produced tokens.
        num_spec_steps: those that verified a draft.
        num_draft_tokens: draft nodes verified.
        num_accepted_draft_tokens: draft nodes accepted.
        acceptance_histogram: the number of drafts by accepted length, from 0.
        by_method: the draft tokens of each method of the chain.
    """

    num_steps: int = 0
    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    acceptance_histogram: list[int] = attrs.field(factory=list)
    by_method: dict[str, DraftCounts] = attrs.field(factory=dict)

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens per verified draft, bonus token included; None if nothing was drafted."""
        return 1 + self.num_accepted_draft_tokens / self.num_spec_steps if self.num_spec_steps else None

    @property
    def draft_acceptance_rate(self) -> float | None:
        """Accepted share of the draft tokens; None if nothing was drafted."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    def record(self, num_nodes: int, num_accepted: int, method: str = "") -> None:
        """Counts one step that produced tokens, and the draft of `method` in it."""
        self.num_steps += 1
        if num_nodes:
            self.num_spec_steps += 1
            self.num_draft_tokens += num_nodes
            self.num_accepted_draft_tokens += num_accepted
            self.acceptance_histogram.extend([0] * (num_accepted + 1 - len(self.acceptance_histogram)))
            self.acceptance_histogram[num_accepted] += 1
            self._add_counts(method, num_nodes, num_accepted)

    def add(self, other: SpeculationStats) -> None:
        """Adds another request's counts."""
        self.num_steps += other.num_steps
        self.num_spec_steps += other.num_spec_steps
        self.num_draft_tokens += other.num_draft_tokens
        self.num_accepted_draft_tokens += other.num_accepted_draft_tokens
        missing = len(other.acceptance_histogram) - len(self.acceptance_histogram)
        self.acceptance_histogram.extend([0] * missing)
        for length, count in enumerate(other.acceptance_histogram):
            self.acceptance_histogram[length] += count
        for method, counts in other.by_method.items():
            self._add_counts(method, counts.num_draft_tokens, counts.num_accepted_draft_tokens)

    def _add_counts(self, method: str, num_nodes: int, num_accepted: int) -> None:
        counts = self.by_method.setdefault(method, DraftCounts())
        counts.num_draft_tokens += num_nodes
        counts.num_accepted_draft_tokens += num_accepted
