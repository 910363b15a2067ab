"""A request, and everything the engine knows about it."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import attrs

from specplug.contract.types import Outcome, TokenView
from specplug.errors import SpecplugError
from specplug.sampling.logprobs import PositionLogprobs
from specplug.sampling.params import SamplingParams
from specplug.sampling.randomness import RowRandomness
from specplug.sampling.rules import LogitsRules
from specplug.stats import SpeculationStats
from specplug.text.stream import TextStream

if TYPE_CHECKING:
    from specplug.engine.calls import Call
    from specplug.model.blocks import BlockTable
    from specplug.speculation.draft import Draft
    from specplug.speculation.estimates import RowEstimate

FinishReason = Literal["stop", "length", "abort", "error"]


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
        rules: what acts on its logits before temperature; None if nothing does.
        text: its output as text; None when it is not decoded.
        num_computed: positions whose KV is final.
        slot: its number while it runs; -1 while it waits.
        table: its blocks while it runs.
        draft: what will be verified with its next token.
        outcome: what became of its last draft.
        outcome_link: the place of its proposer in the chain of speculators.
        estimates: what the automatic budget knows of it, per speculator of the chain; empty until it is asked.
        forked_from: the slot whose blocks it shares, until its first step.
        num_forked_tokens: the computed positions it started with, if it was forked.
        fork_group: sequences to fork from this one when its prompt is computed.
        finish_reason: why it ended; None while it lives.
        stop_reason: the stop string, or the id of `stop_token_ids`, that ended it.
        error: what went wrong, if something did: for its own tokens, or since the engine was closed.
        call: who waits for its outputs; None where only those who step the engine see them.
        sources: for each output token, which method drafted it; None for the target's own.
        logprobs: per output token, if they were asked for.
        prompt_logprobs: per prompt token but the first, as far as they are computed.
        stats: what speculation did for it.
        arrival_time: when it was submitted, in seconds of a monotonic clock; so are the other times.
        first_token_time: when its first token was committed.
        finished_time: when it ended.
    """

    id: str
    number: int
    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    stop_ids: frozenset[int]
    randomness: RowRandomness
    rules: LogitsRules | None = None
    text: TextStream | None = None
    num_computed: int = 0
    slot: int = -1
    table: BlockTable | None = None
    draft: Draft | None = None
    outcome: Outcome | None = None
    outcome_link: int = 0
    estimates: list[RowEstimate] = attrs.field(factory=list)
    forked_from: int | None = None
    num_forked_tokens: int = 0
    fork_group: list[Request] = attrs.field(factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    call: Call | None = None
    sources: list[str | None] = attrs.field(factory=list)
    logprobs: list[PositionLogprobs] = attrs.field(factory=list)
    prompt_logprobs: list[PositionLogprobs] = attrs.field(factory=list)
    stats: SpeculationStats = attrs.field(factory=SpeculationStats)
    arrival_time: float = attrs.field(factory=time.monotonic)
    first_token_time: float | None = None
    finished_time: float | None = None
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
    def num_missing_prompt_logprobs(self) -> int:
        """Prompt tokens whose log-probabilities were asked for and are not there yet."""
        wanted = self.params.prompt_logprobs is not None
        return self.num_prompt_tokens - 1 - len(self.prompt_logprobs) if wanted else 0

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def append(self, tokens: list[int], sources: list[str | None]) -> int:
        """Commits tokens until one ends the request; returns how many were taken."""
        if self.first_token_time is None:
            self.first_token_time = time.monotonic()
        for taken, (token, source) in enumerate(zip(tokens, sources, strict=True), start=1):
            self.tokens.append(token)
            self.sources.append(source)
            self._end_with(token)
            if self.is_finished:
                return taken
        return len(tokens)

    def _end_with(self, token: int) -> None:
        """Ends the request if its newest token does."""
        limit = self.params.max_tokens
        assert limit is not None
        enough = self.num_output_tokens >= self.params.min_tokens
        stops = token in self.stop_ids and enough
        decoded = self.text is not None and (not stops or self.params.include_stop_str_in_output)
        if decoded and self.text is not None and self.text.push(token, may_stop=enough) and not stops:
            self.end("stop", self.text.stop_string)
        if stops:
            self.end("stop", token if token in self.params.stop_token_ids else None)
        elif not self.is_finished and self.num_output_tokens >= limit:
            self.end("length")

    def end(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Marks the request as ended."""
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.finished_time = time.monotonic()
        if self.text is not None:
            self.text.finish()

    def fail(self, error: Exception) -> None:
        """Ends the request for something that concerns no other; what it has generated is kept."""
        text = str(error) or type(error).__name__
        self.error = text if isinstance(error, SpecplugError) else f"{type(error).__name__}: {text}"
        self.draft = None
        with suppress(Exception):  # its text may be what failed
            self.end("error")
