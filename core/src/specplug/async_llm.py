"""The asynchronous API: an engine in a thread of its own, and requests as asynchronous iterators. Names are those of vLLM."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

from specplug.engine.engine import CLOSED
from specplug.engine.startup.report import StepReport
from specplug.engine.thread import EngineThread
from specplug.errors import ConfigurationError, EngineDeadError, RequestError, SpecplugError, one_line
from specplug.frontend.frontend import Frontend
from specplug.frontend.owner import FrontendOwner
from specplug.frontend.submission import Lora, Submission
from specplug.lora.request import LoRARequest
from specplug.outputs import RequestOutput
from specplug.sampling.params import SamplingParams
from specplug.streams.admission import Admission
from specplug.streams.assembly import OutputKind
from specplug.streams.delivery import Delivery
from specplug.streams.encoding import AsyncEncoding, encoder_thread
from specplug.streams.observers import StreamObserver
from specplug.streams.open_streams import OpenStreams
from specplug.streams.stream import RequestStream, check_output_kind, check_timeout
from specplug.text.prompts import EncodedPrompt, Prompt
from specplug.values import is_integer, shown

logger = logging.getLogger("specplug")
_POLL_SECONDS = 0.02


class AsyncLLM(FrontendOwner, AsyncEncoding):
    """A target model with its speculators, for servers. Tasks of any number of event loops and threads may use it.

    One thread runs the engine; another one encodes prompts. Methods that are not coroutines never wait, except `close`.

    Args:
        model: see `LLM`.
        speculative_config: see `LLM`.
        memory: see `LLM`.
        on_step: see `LLM`.
        max_queued_requests: how many sequences may wait in addition to the `max_num_seqs` that run; None sets no limit.
        observers: see the progress of all requests.
        options: see `LLM`.

    Attributes:
        config: the engine's configuration.
        engine: the engine; only its thread may step it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        speculative_config: Mapping[str, Any] | None = None,
        memory: int | float | str | None = None,
        on_step: Callable[[StepReport], None] = lambda report: None,
        max_queued_requests: int | None = None,
        observers: Sequence[StreamObserver] = (),
        **options: Any,
    ) -> None:
        if max_queued_requests is not None and not is_integer(max_queued_requests, 0):
            raise ConfigurationError(
                f"max_queued_requests={shown(max_queued_requests)}: expected an integer of at least 0, or None"
            )
        self._frontend = Frontend(
            model, speculative_config=speculative_config, memory=memory, on_step=on_step, options=options
        )
        self.config = self._frontend.config
        self.engine = self._frontend.engine
        self._observers = tuple(observers)
        self._admission = Admission(self.config.max_num_seqs, max_queued_requests)
        self._encoder = encoder_thread()
        self._numbers = itertools.count()
        self._streams = OpenStreams()
        self._error: EngineDeadError | None = None
        self._delivery = Delivery()
        self._thread = EngineThread(self.engine, after_step=self._delivery.wake, on_failure=self._die)

    # ---- generation -----------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: Lora = None,
        output_kind: OutputKind = "cumulative",
        timeout: float | None = None,
        priority: int = 0,
        trace: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generates the completions of one prompt, and yields outputs as tokens are committed.

        Leaving the loop, cancelling its task or closing the generator aborts the request.

        Args:
            prompt: text, token ids, `{"prompt": …}` or `{"prompt_token_ids": …}`.
            sampling_params: None uses the model's generation_config.
            request_id: a name for `abort`; None makes one.
            lora_request: a LoRA adapter, or the name of a loaded one.
            output_kind: each output holds everything so far (`cumulative`), what is new (`delta`), or there is a single
                output at the end (`final_only`). A delta holds only the completions with new tokens.
            timeout: seconds after which the request is aborted.
            priority: requests with lower numbers come first. Needs `scheduling_policy="priority"`.
            trace: fill in `CompletionOutput.steps`: in each step the draft, what became of it, probabilities and times.

        Raises:
            RequestError: the request can never be served, or the engine was closed.
            QueueFullError: too many requests are waiting.
            DeadlineExceededError: it did not end within `timeout`.
            GenerationError: it failed during generation; raised after the last output.
            EngineDeadError: the engine has stopped after an error.
        """
        self.check_capacity()
        encoded = [attrs.evolve(each, priority=priority) for each in await self.encode(prompt)]
        if len(encoded) != 1:
            raise RequestError(f"generate takes one prompt, not {len(encoded)}; call it once for each, concurrently")
        request_ids = None if request_id is None else [request_id]
        options: dict[str, Any] = {"output_kind": output_kind, "timeout": timeout, "trace": trace}
        (stream,) = await self.submit(encoded, sampling_params, request_ids, lora_request=lora_request, **options)
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def submit(
        self,
        encoded: Sequence[EncodedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        request_ids: Sequence[str] | None = None,
        *,
        lora_request: Lora = None,
        output_kind: OutputKind = "cumulative",
        timeout: float | None = None,
        trace: bool = False,
    ) -> list[RequestStream]:
        """Queues prompts, all of them or none. Whoever does not take all outputs of a stream calls its `close`.

        Args:
            encoded: the results of `encode` or `render`.
            sampling_params: one for all prompts, or one for each; None uses the model's generation_config.
            request_ids: a name for each; None makes them.
            lora_request: an adapter for all of them, or its name.
            output_kind: see `generate`.
            timeout: see `generate`.
            trace: see `generate`.

        Returns:
            A stream for each prompt.

        Raises:
            RequestError: see `generate`, or a name is in use.
            QueueFullError: too many requests are waiting.
            EngineDeadError: the engine has stopped after an error.
        """
        check_output_kind(output_kind)
        check_timeout(timeout)
        arrival_time = time.monotonic()
        ids = [f"specplug-{next(self._numbers)}" for _ in encoded] if request_ids is None else list(request_ids)
        params = self._frontend.params_list(sampling_params, len(encoded))
        self.check_health()
        self._admission.enter({name: each.n for name, each in zip(ids, params, strict=True)}, len(ids))
        streams: list[RequestStream] = []
        try:
            submissions = await self._in_encoder(self._frontend.make, encoded, params, ids, lora_request)
            for submission in submissions:
                for request in submission.family:
                    request.arrival_time = arrival_time
                    request.is_traced = trace
                streams.append(self._stream(submission, output_kind))
            self._streams.add(streams)
            if not self._thread.run_soon(lambda: self._queue(streams)):
                raise self._error or RequestError("the engine is closed")
        except BaseException:
            for name in ids:
                self._forget(name)
            raise
        if timeout is not None:
            for stream in streams:
                stream.expire_after(timeout)
        return streams

    def abort(self, request_id: str) -> bool:
        """Ends a request; returns whether it was unfinished. Its generated tokens are kept and delivered."""
        stream = self._streams.get(request_id)
        if stream is None or stream.has_ended:
            return False
        stream.abort()
        return True

    def abort_all(self) -> None:
        """Ends all requests."""
        for stream in self._streams.all():
            stream.abort()

    def _stream(self, submission: Submission, kind: OutputKind) -> RequestStream:
        return RequestStream(
            submission,
            self._frontend,
            kind=kind,
            touch=self._delivery.touch,
            abort=lambda name: self._thread.run_soon(lambda: self._abort(name)),
            ended=lambda stream: self._forget(stream.request_id),
            observers=self._observers,
        )

    # ---- adapters -------------------------------------------------------------------------------------------------

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """See `LLM.add_lora`."""
        await self._in_encoder(self._frontend.load_adapter, lora_request)
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        """See `LLM.remove_lora`."""
        return self._frontend.adapters.unload(lora_id)

    # ---- the number of requests -----------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """How many sequences run or wait."""
        return self._admission.num_unfinished

    def check_capacity(self) -> None:
        """Refuses a request that the queue has no room for, before work is done for it.

        Raises:
            QueueFullError: too many requests are waiting, or the engine is draining.
            EngineDeadError: the engine has stopped after an error.
        """
        self.check_health()
        self._admission.check()

    def _forget(self, name: str) -> None:
        self._streams.remove(name)
        self._admission.leave(name)  # now somebody else may have the name

    # ---- in the engine's thread -----------------------------------------------------------------------------------

    def _queue(self, streams: list[RequestStream]) -> None:
        try:
            self.engine.submit([stream.submission.family for stream in streams])
        except SpecplugError as error:
            for stream in streams:
                stream.fail(error)

    def _abort(self, name: str) -> None:
        self.engine.abort(name)

    def _die(self, error: BaseException) -> None:
        logger.error("the engine stopped after an error", exc_info=error)
        self._error = EngineDeadError(f"the engine stopped after an error: {one_line(error)}")
        self._streams.fail(self._error)

    # ---- about ----------------------------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> None:
        """Forgets all cached KV before the next step; requests that run go on with theirs."""
        self._thread.run_soon(self.engine.reset_prefix_cache)

    @property
    def is_running(self) -> bool:
        """Whether it serves requests."""
        return self._error is None and not self.engine.is_closed

    @property
    def errored(self) -> bool:
        """Whether it has stopped after an error."""
        return self._error is not None

    def check_health(self) -> None:
        """Raises what is wrong.

        Raises:
            EngineDeadError: the engine has stopped after an error.
            RequestError: this process was forked from the engine's.
        """
        self.engine.lock.check_process()
        if self._error is not None:
            raise EngineDeadError(str(self._error))

    # ---- the end --------------------------------------------------------------------------------------------------

    async def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, and waits until all have ended.

        Args:
            timeout: seconds to wait; None waits as long as it takes.

        Returns:
            Whether all ended. The others continue; `close` ends them.
        """
        self.engine.lock.check_process()
        self._admission.end()
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.num_unfinished:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    def close(self) -> None:
        """Ends all requests and frees all memory; open streams end with an error. Safe to call twice, and in a fork."""
        if self.engine.lock.is_forked:
            return
        self._thread.stop()
        self.engine.close()
        self._delivery.wake()
        self._streams.fail(RequestError(CLOSED))  # those that were never queued
        self._encoder.shutdown()

    shutdown = close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)
