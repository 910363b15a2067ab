"""What users get back, with vLLM's names."""

from __future__ import annotations

import attrs

from specplug.request import SpeculationStats


@attrs.define
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: which of the `n` completions.
        text: the decoded output; empty without a tokenizer.
        token_ids: the generated ids.
        finish_reason: `stop`, `length` or `abort`; None while it is generated.
        stop_reason: the id in `stop_token_ids` that ended it, if one did.
        token_sources: for each id the method that drafted it, None for the target's own.
        metrics: what speculation did for it.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | None
    token_sources: list[str | None]
    metrics: SpeculationStats


@attrs.define
class RequestOutput:
    """A prompt and its completions.

    Attributes:
        request_id: the request's name.
        prompt: the prompt's text, if it was given as text.
        prompt_token_ids: the prompt's ids.
        outputs: the completions, by index.
        finished: whether all of them have ended.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
