"""The outputs of `LLM` and `AsyncLLM`, with vLLM's names."""

from __future__ import annotations

import attrs

from specplug.lora.request import LoRARequest
from specplug.sampling.logprobs import PositionLogprobs
from specplug.stats import SpeculationStats
from specplug.trace import StepTrace


@attrs.define
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: which of the `n` completions.
        text: the decoded output; empty without a tokenizer.
        token_ids: the generated ids.
        cumulative_logprob: the sum of the chosen tokens' log-probabilities, if `logprobs` was requested.
        logprobs: per generated token, the requested log-probabilities.
        finish_reason: `stop`, `length`, `abort`, or `error` if this completion failed; None before it ends.
        stop_reason: the stop string, or the id of `stop_token_ids`, that ended it.
        spec_decode_metrics: its speculation counters.
        token_sources: for each id the method that drafted it; None for the target's own.
        unverified_methods: methods with their own `verify` that drafted for it; core does not check their results.
        error: the failure, if `finish_reason` is `error`.
        token_texts: from `AsyncLLM`, for each id the text that it completes; empty while a character is incomplete.
        steps: from `AsyncLLM`, if the request is traced: what each step did.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[PositionLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
    spec_decode_metrics: SpeculationStats
    token_sources: list[str | None]
    unverified_methods: list[str] = attrs.field(factory=list)
    error: str | None = None
    token_texts: list[str] = attrs.field(factory=list)
    steps: list[StepTrace] = attrs.field(factory=list)

    @property
    def metrics(self) -> SpeculationStats:
        """The same as `spec_decode_metrics`."""
        return self.spec_decode_metrics

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@attrs.define
class RequestMetrics:
    """The times of one request, in seconds of a monotonic clock.

    Attributes:
        arrival_time: when it was submitted.
        first_token_time: when its first token was committed.
        finished_time: when its last completion ended.
    """

    arrival_time: float
    first_token_time: float | None
    finished_time: float | None


@attrs.define
class RequestOutput:
    """A prompt and its completions.

    Attributes:
        request_id: the request's name.
        prompt: the prompt's text, if it was given as text; for `chat`, the rendered template.
        prompt_token_ids: the prompt's ids.
        prompt_logprobs: per prompt token, the requested log-probabilities; None for the first token.
        outputs: the completions, by index.
        finished: whether all of them have ended.
        metrics: its times.
        num_cached_tokens: prompt tokens whose KV was taken from the prefix cache.
        lora_request: the LoRA adapter that generated it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    lora_request: LoRARequest | None = None


@attrs.frozen(eq=False)
class StreamedPiece:
    """New tokens of one completion.

    Attributes:
        request_id: the request.
        index: the completion.
        token_ids: the new ids.
        sources: for each id the method that drafted it; None for the target's own.
        token_texts: for each id the text that it completes; empty while a character is incomplete.
        finish_reason: set on the last piece.
        metrics: the completion's speculation counters so far; the same object in all its pieces.
        error: the failure, if `finish_reason` is `error`.
    """

    request_id: str
    index: int
    token_ids: list[int]
    sources: list[str | None]
    token_texts: list[str]
    finish_reason: str | None
    metrics: SpeculationStats
    error: str | None = None

    @property
    def text(self) -> str:
        """The text that the new tokens add."""
        return "".join(self.token_texts)
