"""From requests to outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specplug.frontend.submission import Submission
from specplug.outputs import CompletionOutput, RequestOutput
from specplug.request import Request
from specplug.text.prompts import LazyTokenizer
from specplug.text.token_decoder import TokenDecoder


class OutputBuilder:
    """Builds the outputs of one engine.

    Args:
        tokenizer: returns the tokenizer, or None.
        unverified_methods: the methods with their own `verify`.
    """

    def __init__(self, tokenizer: LazyTokenizer, unverified_methods: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._unverified_methods = unverified_methods

    def build(self, submitted: Submission) -> RequestOutput:
        """The current output of a submission, all of it."""
        first = submitted.family[0]
        scores = None if first.params.prompt_logprobs is None else [None, *first.prompt_logprobs]
        try:
            self.with_text(scores)
        except Exception as error:  # as in `_completion`
            first.fail(error)
        return RequestOutput(
            request_id=submitted.id,
            prompt=submitted.prompt,
            prompt_token_ids=first.tokens[: first.num_prompt_tokens],
            prompt_logprobs=scores,
            outputs=[self._completion(index, request) for index, request in enumerate(submitted.family)],
            finished=all(request.is_finished for request in submitted.family),
            metrics=submitted.metrics,
            num_cached_tokens=first.num_cached_tokens or 0,
            lora_request=submitted.lora_request,
        )

    def _completion(self, index: int, request: Request) -> CompletionOutput:
        """The current output of one sequence, all of it."""
        ids = request.output_ids
        scored = request.params.logprobs is not None
        try:
            logprobs = self.with_text(request.logprobs) if scored else None
        except Exception as error:  # the tokenizer fails on its own ids
            request.fail(error)
            logprobs = request.logprobs
        is_whole = request.error is None
        return CompletionOutput(
            index=index,
            text="" if request.text is None else request.text.text,
            token_ids=ids,
            cumulative_logprob=(
                sum(position[token].logprob for position, token in zip(request.logprobs, ids, strict=is_whole))
                if scored
                else None
            ),
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            spec_decode_metrics=request.stats,
            token_sources=request.sources,
            unverified_methods=self.unverified_methods(request),
            error=request.error if request.finish_reason == "error" else None,
        )

    def unverified_methods(self, request: Request) -> list[str]:
        """The methods with their own `verify` that have drafted for a request."""
        return [method for method in self._unverified_methods if method in request.stats.by_method]

    def with_text(self, positions: Any) -> Any:
        """Fills in the token texts of log-probabilities, decoded as after other text."""
        tokenizer = self._tokenizer() if positions else None
        if tokenizer is not None:
            decoder = TokenDecoder.of(tokenizer)
            for position in positions:
                for token, logprob in (position or {}).items():
                    logprob.decoded_token = decoder.token(token)
        return positions
