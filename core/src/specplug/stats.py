"""Speculation counters of a request or an engine."""

from __future__ import annotations

from collections.abc import Sequence

import attrs


def accepted_by_position(histogram: Sequence[int]) -> list[int]:
    """From the number of drafts by accepted length to the number of accepted tokens by position in the draft, from 0."""
    return [sum(histogram[position:]) for position in range(1, len(histogram))]


@attrs.define
class DraftCounts:
    """Counts of one method's draft tokens.

    Attributes:
        num_draft_tokens: draft nodes verified.
        num_accepted_draft_tokens: draft nodes accepted.
        acceptance_histogram: the number of drafts by accepted length, from 0.
    """

    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    acceptance_histogram: list[int] = attrs.field(factory=list)

    @property
    def num_drafts(self) -> int:
        """Drafts verified."""
        return sum(self.acceptance_histogram)


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
            _count_at(self.acceptance_histogram, num_accepted, 1)
            counts = self.by_method.setdefault(method, DraftCounts())
            counts.num_draft_tokens += num_nodes
            counts.num_accepted_draft_tokens += num_accepted
            _count_at(counts.acceptance_histogram, num_accepted, 1)

    def add(self, other: SpeculationStats) -> None:
        """Adds another request's counts."""
        self.num_steps += other.num_steps
        self.num_spec_steps += other.num_spec_steps
        self.num_draft_tokens += other.num_draft_tokens
        self.num_accepted_draft_tokens += other.num_accepted_draft_tokens
        _add_histogram(self.acceptance_histogram, other.acceptance_histogram)
        for method, more in other.by_method.items():
            counts = self.by_method.setdefault(method, DraftCounts())
            counts.num_draft_tokens += more.num_draft_tokens
            counts.num_accepted_draft_tokens += more.num_accepted_draft_tokens
            _add_histogram(counts.acceptance_histogram, more.acceptance_histogram)


def _count_at(histogram: list[int], length: int, count: int) -> None:
    histogram.extend([0] * (length + 1 - len(histogram)))
    histogram[length] += count


def _add_histogram(histogram: list[int], other: list[int]) -> None:
    for length, count in enumerate(other):
        _count_at(histogram, length, count)
