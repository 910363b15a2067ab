"""Outputs of a request on their way from the engine's thread to an event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, Protocol, Self, get_args

import attrs

from specplug.errors import DeadlineExceededError, GenerationError, RequestError, SpecplugError, one_line
from specplug.frontend import Frontend, Submission
from specplug.outputs import CompletionOutput, RequestOutput
from specplug.request import Request, StepOutput
from specplug.sampling.logprobs import PositionLogprobs
from specplug.trace import StepTrace
from specplug.values import shown

OutputKind = Literal["cumulative", "delta", "final_only"]
"""What an output of a stream holds: everything so far, what is new, or everything once it has ended (vLLM's names)."""


def check_output_kind(value: Any) -> None:
    """Refuses an unknown kind.

    Raises:
        RequestError: the message names the known ones.
    """
    if value not in get_args(OutputKind):
        raise RequestError(f"output_kind={shown(value)}: expected one of {', '.join(get_args(OutputKind))}")


class StreamObserver(Protocol):
    """Sees the progress of all requests. Called in the engine's thread, so it must be quick, and may not raise."""

    def add(self, request: Request, num_tokens: int, seconds: float) -> None:
        """One sequence has new tokens.

        Args:
            request: the sequence.
            num_tokens: how many; 0 if it failed.
            seconds: since its last tokens; for the first ones, since its arrival.
        """

    def end(self, request: Request) -> None:
        """One sequence has ended, for any reason."""


@attrs.frozen(eq=False)
class _Arrival:
    """What a step committed for one sequence, and how it had ended by then."""

    index: int
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
    last_time: float = 0.0


class RequestStream:
    """The outputs of one prompt as an asynchronous iterator. `AsyncLLM.submit` makes it; one task may iterate over it.

    A consumer that is slower than the engine gets the tokens of several steps in one output. After the last output,
    iteration raises what went wrong, if anything.

    Args:
        submission: the prompt's requests; the stream becomes their listener.
        frontend: builds outputs.
        kind: what an output holds.
        touch: called in the engine's thread if there is something to take after this step.
        abort: has the engine end a request, by its name; never waits.
        ended: called once, in any thread, when all sequences have ended.
        observers: see the progress.

    Attributes:
        submission: the prompt's requests.
        loop: the event loop of the consumer.
        woken_at: when the consumer was last told of outputs, in seconds of a monotonic clock.
    """

    def __init__(
        self,
        submission: Submission,
        frontend: Frontend,
        *,
        kind: OutputKind,
        touch: Callable[[RequestStream], None],
        abort: Callable[[str], object],
        ended: Callable[[RequestStream], None],
        observers: tuple[StreamObserver, ...] = (),
    ) -> None:
        self.submission = submission
        self.loop = asyncio.get_running_loop()
        self.woken_at = -math.inf
        self._frontend = frontend
        self._kind = kind
        self._touch = touch
        self._abort = abort
        self._ended = ended
        self._observers = observers
        self._progress = [_Progress(request) for request in submission.family]
        self._index_of = {request.number: index for index, request in enumerate(submission.family)}
        self._num_running = len(submission.family)
        self._arrived: deque[_Arrival] = deque()
        self._woken = asyncio.Event()
        self._failure: SpecplugError | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._is_released = False
        self._prompt_ids = submission.family[0].tokens[: submission.family[0].num_prompt_tokens]
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        for progress in self._progress:
            progress.last_time = progress.request.arrival_time
            progress.request.listener = self

    @property
    def request_id(self) -> str:
        """The request's name."""
        return self.submission.id

    @property
    def has_ended(self) -> bool:
        """Whether the engine has nothing more for it; outputs may still wait to be taken."""
        return self._num_running == 0 or self._failure is not None

    # ---- in the engine's thread -----------------------------------------------------------------------------------

    def add(self, output: StepOutput) -> None:
        """Receives what a step committed for one of its requests."""
        request = output.request
        index = self._index_of[request.number]
        self._arrived.append(_Arrival(index, output, request.finish_reason))
        if self._observers:
            now, before = time.monotonic(), self._progress[index].last_time
            self._progress[index].last_time = now
            for observer in self._observers:
                observer.add(request, len(output.new_tokens), now - before)
        if request.is_finished:
            self._end(request)
        elif self._kind != "final_only":
            self._touch(self)

    def end(self, request: Request) -> None:
        """Notes that a request was aborted."""
        self._arrived.append(_Arrival(self._index_of[request.number], None, request.finish_reason))
        self._end(request)

    def _end(self, request: Request) -> None:
        self._num_running -= 1
        for observer in self._observers:
            observer.end(request)
        if self._num_running == 0:
            self._release()
        self._touch(self)

    def _release(self) -> None:
        if not self._is_released:
            self._is_released = True
            self._ended(self)

    # ---- in any thread --------------------------------------------------------------------------------------------

    def fail(self, error: SpecplugError) -> None:
        """Ends the stream with an error; outputs that have arrived are delivered first."""
        if self._failure is None:
            self._failure = error
        self._release()
        self.wake()

    def wake(self) -> None:
        """Tells the consumer that there is something to take."""
        try:
            self.loop.call_soon_threadsafe(self._woken.set)
        except RuntimeError:  # the loop is closed: there is no consumer
            self.abort()

    def abort(self) -> None:
        """Ends the request if it is unfinished; never waits. Its generated tokens are kept, and delivered."""
        if not self.has_ended:
            self._abort(self.submission.id)

    # ---- in the event loop ----------------------------------------------------------------------------------------

    def notify(self) -> None:
        """Like `wake`, in the consumer's event loop."""
        self._woken.set()

    def expire_after(self, seconds: float) -> None:
        """Sets the deadline."""
        self._deadline = self.loop.call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        if not self.has_ended:
            self.abort()
            message = f"the request did not end within its timeout of {seconds:g} s"
            self.fail(DeadlineExceededError(message))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while True:
            if self._arrived and (self._kind != "final_only" or self._num_running == 0):
                return self._take()
            if self.has_ended and not self._arrived:
                break
            if self._failure is not None:  # of the outputs of a stream that delivers the last one only
                self._failure_outputs(self._take())
                break
            self._woken.clear()
            await self._woken.wait()
        self.close()
        self._raise_failure()
        raise StopAsyncIteration

    def close(self) -> None:
        """Aborts the request if it is unfinished, and forgets its deadline. Safe to call twice."""
        if self._deadline is not None:
            self._deadline.cancel()
        self.abort()

    def _failure_outputs(self, output: RequestOutput) -> None:
        if isinstance(self._failure, GenerationError):
            self._failure.outputs = [output]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        requests = self.submission.family
        failed = [request.error for request in requests if request.finish_reason == "error" and request.error]
        if failed:
            raise GenerationError("; ".join(failed), [self._frontend.output(self.submission)])
        closed = next((request.error for request in requests if request.error is not None), None)
        if closed is not None:
            raise RequestError(closed)

    def _take(self) -> RequestOutput:
        """All that has arrived, as one output."""
        new: dict[int, list[StepOutput]] = {}
        while self._arrived:
            arrival = self._arrived.popleft()
            steps = new.setdefault(arrival.index, [])
            if arrival.output is not None:
                steps.append(arrival.output)
            self._progress[arrival.index].finish_reason = arrival.finish_reason
        deltas = {index: self._delta(index, steps) for index, steps in new.items()}
        if self._kind == "delta":
            outputs = [deltas[index] for index in sorted(deltas)]
        else:
            outputs = [self._whole(index, progress) for index, progress in enumerate(self._progress)]
        return RequestOutput(
            request_id=self.submission.id,
            prompt=self.submission.prompt,
            prompt_token_ids=self._prompt_ids,
            prompt_logprobs=self._scores(),
            outputs=outputs,
            finished=all(progress.finish_reason is not None for progress in self._progress),
            metrics=self._frontend.times(self.submission),
            num_cached_tokens=self.submission.family[0].num_cached_tokens or 0,
            lora_request=self.submission.lora_request,
        )

    def _scores(self) -> list[PositionLogprobs | None] | None:
        """The log-probabilities of the prompt. They are complete when the first output arrives."""
        first = self.submission.family[0]
        if self._prompt_logprobs is None and first.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None, *self._with_text(first.prompt_logprobs)]
        return self._prompt_logprobs

    def _with_text(self, positions: list[PositionLogprobs]) -> list[PositionLogprobs]:
        try:
            self._frontend.with_text(positions)
        except Exception as error:  # the tokenizer fails on its own ids: then so does the request's text
            self.abort()
            self.fail(GenerationError(f"the tokenizer cannot decode log-probabilities: {one_line(error)}"))
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
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=ids,
            cumulative_logprob=None if logprobs is None else progress.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=progress.finish_reason,
            stop_reason=request.stop_reason if progress.finish_reason is not None else None,
            spec_decode_metrics=request.stats,
            token_sources=[source for step in steps for source in step.sources],
            unverified_methods=self._frontend.unverified_methods(request),
            error=request.error if progress.finish_reason == "error" else None,
            token_texts=texts,
            steps=traces,
        )

    def _whole(self, index: int, progress: _Progress) -> CompletionOutput:
        """All that has been taken of one sequence."""
        request, count = progress.request, progress.num_tokens
        return CompletionOutput(
            index=index,
            text=progress.text,
            token_ids=request.output_ids[:count],
            cumulative_logprob=None if request.params.logprobs is None else progress.cumulative_logprob,
            logprobs=None if request.params.logprobs is None else request.logprobs[:count],
            finish_reason=progress.finish_reason,
            stop_reason=request.stop_reason if progress.finish_reason is not None else None,
            spec_decode_metrics=request.stats,
            token_sources=request.sources[:count],
            unverified_methods=self._frontend.unverified_methods(request),
            error=request.error if progress.finish_reason == "error" else None,
            token_texts=list(progress.texts),
            steps=list(progress.steps),
        )
