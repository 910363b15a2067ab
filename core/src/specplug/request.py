"""A request, and everything the engine knows about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

from specplug.contract.batch import Outcome, TokenView
from specplug.sampling.params import SamplingParams
from specplug.sampling.randomness import RowRandomness

if TYPE_CHECKING:
    from specplug.model.blocks import BlockTable
    from specplug.speculation.draft import Draft

FinishReason = Literal["stop", "length", "abort"]


@attrs.define
class DraftCounts:
    """What became of one method's draft tokens.

    Attributes:
        num_draft_tokens: draft nodes verified.
        num_accepted_draft_tokens: draft nodes accepted.
    """

    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0


@attrs.define
class SpeculationStats:
    """What speculation did for one request.

    Attributes:
        num_steps: target forwards that produced tokens.
        num_spec_steps: those that verified a draft.
        num_draft_tokens: draft nodes verified.
        num_accepted_draft_tokens: draft nodes accepted.
        acceptance_histogram: how many drafts were accepted to each length, 0 first.
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
        """Counts one producing step, and what `method` drafted for it."""
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


@attrs.define(eq=False)
class Request:
    """One sequence from submission to its end.

    Attributes:
        id: the caller's name for it.
        number: the running number in its engine.
        tokens: prompt and output ids; all are committed.
        num_prompt_tokens: how many of them are the prompt.
        params: sampling parameters, with `max_tokens` resolved.
        stop_ids: ids that end the output.
        randomness: its random streams.
        num_computed: positions whose KV is final.
        slot: its number while it runs; -1 while it waits.
        table: its blocks while it runs.
        draft: what will be verified with its next token.
        outcome: what became of its last draft.
        forked_from: the slot whose blocks it shares, until its first step.
        num_forked_tokens: the computed positions it started with, if it was forked.
        fork_group: sequences to fork from this one when its prompt is computed.
        finish_reason: why it ended; None while it lives.
        sources: for each output token, which method drafted it; None for the target's own.
    """

    id: str
    number: int
    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    stop_ids: frozenset[int]
    randomness: RowRandomness
    num_computed: int = 0
    slot: int = -1
    table: BlockTable | None = None
    draft: Draft | None = None
    outcome: Outcome | None = None
    forked_from: int | None = None
    num_forked_tokens: int = 0
    fork_group: list[Request] = attrs.field(factory=list)
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    sources: list[str | None] = attrs.field(factory=list)
    stats: SpeculationStats = attrs.field(factory=SpeculationStats)
    view: TokenView = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.view = TokenView(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        """The generated ids."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_pending(self) -> int:
        """Committed tokens whose KV is not computed: one while decoding, more while prefilling."""
        return len(self.tokens) - self.num_computed

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def append(self, tokens: list[int], sources: list[str | None]) -> int:
        """Commits tokens until one ends the request; returns how many were taken."""
        limit = self.params.max_tokens
        assert limit is not None
        for taken, (token, source) in enumerate(zip(tokens, sources, strict=True), start=1):
            self.tokens.append(token)
            self.sources.append(source)
            if token in self.stop_ids:
                self.finish_reason = "stop"
                self.stop_token = token
            elif self.num_output_tokens >= limit:
                self.finish_reason = "length"
            if self.is_finished:
                return taken
        return len(tokens)
