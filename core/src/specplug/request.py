"""A request, its state in the engine, and what a step returns for it."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, Protocol

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
    from specplug.lora.registry import LoadedAdapter
    from specplug.model.kv_cache import BlockTable
    from specplug.speculation.draft import Draft
    from specplug.trace import StepTrace

FinishReason = Literal["stop", "length", "abort", "error"]


class OutputListener(Protocol):
    """Receives what steps commit for a request."""

    def add(self, output: StepOutput) -> None:
        """Called after every step that committed tokens for the request, or in which it failed."""

    def end(self, request: Request) -> None:
        """Called when a request has ended without an output."""


@attrs.define(eq=False)
class Request:
    """One sequence from submission to its end.

    Attributes:
        id: the caller's name for it.
        number: its consecutive number in its engine.
        tokens: prompt and output ids; all are committed.
        num_prompt_tokens: how many of them are the prompt.
        params: sampling parameters, with `max_tokens` resolved.
        stop_ids: ids that end the output.
        randomness: its random streams.
        rules: rules that change its logits before temperature; None if there are none.
        text: its output as text; None if it is not decoded.
        num_computed: positions whose KV is final.
        slot: its row number while it runs; -1 while it waits.
        table: its KV blocks while it runs.
        in_flight: a placeholder (see `PendingTokens`) for a token that was drawn on the device and is not committed yet; the
            next forward may run it. None if there is none.
        draft: the draft that the next step verifies.
        outcome: the result of its last draft.
        forked_from: the row whose blocks it shares, until its first step.
        num_forked_tokens: the computed positions it started with, if it was forked.
        cache_salt: requests with different salts share no cached KV.
        priority: requests with lower numbers come first.
        adapter: the LoRA adapter that it uses from its first token to its last.
        block_digests: names of its first full KV blocks, as far as they were needed.
        num_cached_tokens: its first tokens that the prefix cache had when it first started; None before that, or without one.
        num_stored_blocks: its first blocks that need not be added to the prefix cache any more.
        num_followed_blocks: speculator of the chain → first blocks of which the prefix cache knows that it wrote them.
        stored_by: speculator of the chain → its first positions that have that speculator's entries from the prefix cache;
            until the chain is told.
        fork_group: sequences to fork from this one once its prompt is computed.
        finish_reason: why it ended; None before that.
        stop_reason: the stop string, or the id of `stop_token_ids`, that ended it.
        error: the failure of this request, or that the engine was closed; else None.
        listener: receives its outputs; None if only the caller of `Engine.step` sees them.
        is_traced: whether its outputs say in detail what each step did.
        sources: for each output token, the method that drafted it; None for the target's own.
        logprobs: per output token, if they were requested.
        prompt_logprobs: per prompt token except the first, as far as they are computed.
        stats: its speculation counters.
        arrival_time: when it was submitted, in seconds of a monotonic clock, like the other times.
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
    in_flight: int | None = None
    draft: Draft | None = None
    outcome: Outcome | None = None
    forked_from: int | None = None
    num_forked_tokens: int = 0
    cache_salt: str | None = None
    priority: int = 0
    adapter: LoadedAdapter | None = None
    block_digests: list[bytes] = attrs.field(factory=list)
    num_cached_tokens: int | None = None
    num_stored_blocks: int = 0
    num_followed_blocks: dict[int, int] = attrs.field(factory=dict)
    stored_by: dict[int, int] = attrs.field(factory=dict)
    fork_group: list[Request] = attrs.field(factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    listener: OutputListener | None = None
    is_traced: bool = False
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
        """Tokens whose KV is not computed: one while decoding, more while prefilling."""
        return len(self.tokens) + (self.in_flight is not None) - self.num_computed

    @property
    def is_ending(self) -> bool:
        """Whether the token in flight is the last one that it may have."""
        limit = self.params.max_tokens
        assert limit is not None
        return self.in_flight is not None and self.num_output_tokens + 1 >= limit

    @property
    def num_missing_prompt_logprobs(self) -> int:
        """Prompt tokens whose log-probabilities were requested and are not computed yet."""
        wanted = self.params.prompt_logprobs is not None
        return self.num_prompt_tokens - 1 - len(self.prompt_logprobs) if wanted else 0

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def append(self, tokens: list[int], sources: list[str | None]) -> int:
        """Commits tokens until one ends the request; returns how many were committed."""
        if self.first_token_time is None:
            self.first_token_time = time.monotonic()
        limit, text = self.params.max_tokens, self.text
        assert limit is not None
        left = limit - self.num_output_tokens
        for taken, (token, source) in enumerate(zip(tokens, sources, strict=True), start=1):
            self.tokens.append(token)
            self.sources.append(source)
            if token in self.stop_ids or taken >= left or self.params.min_tokens:
                self._end_with(token)
            elif text is not None and text.push(token):
                self.end("stop", text.stop_string)
            if self.finish_reason is not None:
                return taken
        return len(tokens)

    def _end_with(self, token: int) -> None:
        """Ends the request if its last token does."""
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
        """Ends the request after an error that affects no other; its generated tokens are kept."""
        text = str(error) or type(error).__name__
        self.error = text if isinstance(error, SpecplugError) else f"{type(error).__name__}: {text}"
        self.draft = None
        with suppress(Exception):  # decoding its text may be what failed
            self.end("error")


@attrs.define(eq=False)  # several per row and step: frozen takes twice as long
class StepOutput:
    """What a step committed for one request: on a GPU also what the step before did, which is delivered meanwhile.

    Attributes:
        request: the request.
        new_tokens: the committed ids.
        sources: for each id the method that drafted it; None for the target's own.
        texts: for each id the text that it completes.
        trace: the details; None unless the request is traced.
    """

    request: Request
    new_tokens: list[int]
    sources: list[str | None]
    texts: list[str]
    trace: StepTrace | None = None

    def joined(self, after: StepOutput) -> StepOutput:
        """This output and the one after it, as one."""
        return StepOutput(
            self.request,
            self.new_tokens + after.new_tokens,
            self.sources + after.sources,
            self.texts + after.texts,
            after.trace,
        )
