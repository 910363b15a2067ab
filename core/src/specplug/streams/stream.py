"""Outputs of a request on their way from the engine's thread to an event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self, get_args

from specplug.errors import DeadlineExceededError, GenerationError, RequestError, SpecplugError
from specplug.frontend.frontend import Frontend
from specplug.frontend.submission import Submission
from specplug.outputs import RequestOutput
from specplug.request import Request, StepOutput
from specplug.streams.assembly import Arrival, Assembly, OutputKind
from specplug.streams.observers import StreamObserver
from specplug.values import shown


def check_output_kind(value: Any) -> None:
    """Refuses an unknown kind.

    Raises:
        RequestError: the message names the known ones.
    """
    if value not in get_args(OutputKind):
        raise RequestError(f"output_kind={shown(value)}: expected one of {', '.join(get_args(OutputKind))}")


def check_timeout(value: Any) -> None:
    """Refuses what is not a positive number of seconds or None.

    Raises:
        RequestError: the message says what was given.
    """
    if value is not None and not (isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0):
        raise RequestError(f"timeout={shown(value)}: expected a positive number of seconds, or None")


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
        self._assembly = Assembly(submission, frontend.outputs, kind, self._break)
        self._index_of = {request.number: index for index, request in enumerate(submission.family)}
        self._last_times = [request.arrival_time for request in submission.family]
        self._num_running = len(submission.family)
        self._arrived: deque[Arrival] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._failure: SpecplugError | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._is_released = False
        for request in submission.family:
            request.listener = self

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
        self._arrived.append(Arrival(index, output, request.finish_reason))
        if self._observers:
            now, before = time.monotonic(), self._last_times[index]
            self._last_times[index] = now
            for observer in self._observers:
                observer.add(request, len(output.new_tokens), now - before)
        if request.is_finished:
            self._end(request)
        elif self._kind != "final_only":
            self._touch(self)

    def end(self, request: Request) -> None:
        """Notes that a request was aborted."""
        self._arrived.append(Arrival(self._index_of[request.number], None, request.finish_reason))
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
            self.loop.call_soon_threadsafe(self.notify)
        except RuntimeError:  # the loop is closed: there is no consumer
            self.abort()

    def abort(self) -> None:
        """Ends the request if it is unfinished; never waits. Its generated tokens are kept, and delivered."""
        if not self.has_ended:
            self._abort(self.submission.id)

    # ---- in the event loop ----------------------------------------------------------------------------------------

    def notify(self) -> None:
        """Like `wake`, in the consumer's event loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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
            self._frontend.engine.lock.check_process()
            self._waiter = self.loop.create_future()
            await self._waiter
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
            raise GenerationError("; ".join(failed), [self._frontend.outputs.build(self.submission)])
        closed = next((request.error for request in requests if request.error is not None), None)
        if closed is not None:
            raise RequestError(closed)

    def _take(self) -> RequestOutput:
        """All that has arrived, as one output."""
        arrived = self._arrived
        return self._assembly.output([arrived.popleft() for _ in range(len(arrived))])

    def _break(self, error: GenerationError) -> None:
        """Ends the stream after an error that only its outputs have."""
        self.abort()
        self.fail(error)
