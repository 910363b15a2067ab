"""From what steps committed to the outputs of a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import attrs

from specplug.errors import GenerationError, one_line
from specplug.frontend.output_builder import OutputBuilder
from specplug.frontend.submission import Submission
from specplug.outputs import CompletionOutput, RequestOutput
from specplug.request import Request, StepOutput
from specplug.sampling.logprobs import PositionLogprobs
from specplug.trace import StepTrace

OutputKind = Literal["cumulative", "delta", "final_only"]
"""What an output of a stream holds: everything so far, what is new, or everything once it has ended (vLLM's names)."""


class Arrival(NamedTuple):
    """What a step committed for one sequence, and how it had ended by then."""

    completion: int
    output: StepOutput | None
    finish_reason: str | None


@attrs.define(eq=False)
class _Progress:
    """What has been taken of one sequence."""

    request: Request
    num_tokens: int = 0
    num_characters: int = 0
    text: str = ""
    texts: list[str] = attrs.field(factory=list)
    steps: list[StepTrace] = attrs.field(factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None


class Assembly:
    """Builds the outputs of one prompt.

    Args:
        submission: the prompt's requests.
        builder: decodes tokens.
        kind: what an output holds.
        on_error: called if the tokenizer cannot decode its own ids.
    """

    def __init__(
        self,
        submission: Submission,
        builder: OutputBuilder,
        kind: OutputKind,
        on_error: Callable[[GenerationError], None],
    ) -> None:
        self._submission = submission
        self._builder = builder
        self._kind = kind
        self._on_error = on_error
        self._first = submission.family[0]
        self._progress = [_Progress(request) for request in submission.family]
        self._num_finished = 0
        self._prompt_ids = self._first.tokens[: self._first.num_prompt_tokens]
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None

    def output(self, arrivals: list[Arrival]) -> RequestOutput:
        """All that has arrived, as one output."""
        new: dict[int, list[StepOutput]] = {}
        for index, step, finish_reason in arrivals:
            steps = new.setdefault(index, [])
            if step is not None:
                steps.append(step)
            if finish_reason is not None:
                progress = self._progress[index]
                self._num_finished += progress.finish_reason is None
                progress.finish_reason = finish_reason
        deltas = [self._delta(index, new[index]) for index in sorted(new)]
        return RequestOutput(
            request_id=self._submission.id,
            prompt=self._submission.prompt,
            prompt_token_ids=self._prompt_ids,
            prompt_logprobs=self._scores(),
            outputs=deltas if self._kind == "delta" else list(map(self._whole, range(len(self._progress)))),
            finished=self._num_finished == len(self._progress),
            metrics=self._submission.metrics,
            num_cached_tokens=self._first.num_cached_tokens or 0,
            lora_request=self._submission.lora_request,
        )

    def _scores(self) -> list[PositionLogprobs | None] | None:
        """The log-probabilities of the prompt. They are complete when the first output arrives."""
        if self._prompt_logprobs is None and self._first.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None, *self._with_text(self._first.prompt_logprobs)]
        return self._prompt_logprobs

    def _with_text(self, positions: list[PositionLogprobs]) -> list[PositionLogprobs]:
        try:
            self._builder.with_text(positions)
        except Exception as error:  # the tokenizer fails on its own ids: then so does the request's text
            self._on_error(GenerationError(f"the tokenizer cannot decode log-probabilities: {one_line(error)}"))
        return positions

    def _delta(self, index: int, steps: list[StepOutput]) -> CompletionOutput:
        """What several steps committed for one sequence."""
        progress = self._progress[index]
        request, begin = progress.request, progress.num_tokens
        ids = [token for step in steps for token in step.new_tokens]
        texts = [text for step in steps for text in step.texts]
        traces = [step.trace for step in steps if step.trace is not None]
        text = "".join(texts)
        if progress.finish_reason is not None and request.text is not None:
            rest = request.text.text[progress.num_characters + len(text) :]  # held back when the request was aborted
            text += rest
            if rest and texts:
                texts[-1] += rest
        progress.num_tokens += len(ids)
        progress.num_characters += len(text)
        if self._kind != "delta":
            progress.text += text
            progress.texts += texts
            progress.steps += traces
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = self._with_text(request.logprobs[begin : progress.num_tokens])
            progress.cumulative_logprob += sum(
                position[token].logprob for position, token in zip(logprobs, ids, strict=False)
            )
        sources = [source for step in steps for source in step.sources]
        return self._completion(index, text, ids, logprobs, sources, texts, traces)

    def _whole(self, index: int) -> CompletionOutput:
        """All that has been taken of one sequence."""
        progress = self._progress[index]
        request, count = progress.request, progress.num_tokens
        logprobs = None if request.params.logprobs is None else request.logprobs[:count]
        ids, sources = request.output_ids[:count], request.sources[:count]
        return self._completion(
            index, progress.text, ids, logprobs, sources, list(progress.texts), list(progress.steps)
        )

    def _completion(
        self,
        index: int,
        text: str,
        ids: list[int],
        logprobs: list[PositionLogprobs] | None,
        sources: list[str | None],
        texts: list[str],
        steps: list[StepTrace],
    ) -> CompletionOutput:
        progress = self._progress[index]
        request, finish_reason = progress.request, progress.finish_reason
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=ids,
            cumulative_logprob=None if logprobs is None else progress.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=request.stop_reason if finish_reason is not None else None,
            spec_decode_metrics=request.stats,
            token_sources=sources,
            unverified_methods=self._builder.unverified_methods(request),
            error=request.error if finish_reason == "error" else None,
            token_texts=texts,
            steps=steps,
        )
