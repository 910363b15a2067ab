"""The asynchronous API: an engine in a thread of its own, and requests as asynchronous iterators. Names are those of vLLM."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from specplug.engine.engine import CLOSED
from specplug.engine.startup import StepReport
from specplug.engine.thread import EngineThread
from specplug.errors import (
    ConfigurationError,
    EngineDeadError,
    QueueFullError,
    RequestError,
    SpecplugError,
    one_line,
)
from specplug.frontend import Frontend, FrontendOwner, Lora, Submission
from specplug.lora.request import LoRARequest
from specplug.outputs import RequestOutput
from specplug.sampling.params import SamplingParams
from specplug.streams import OutputKind, RequestStream, StreamObserver, check_output_kind
from specplug.text.prompts import EncodedPrompt, Message, Prompt
from specplug.values import is_integer, shown

logger = logging.getLogger("specplug")
_POLL_SECONDS = 0.02
_SECONDS_PER_OUTPUT = 0.001  # of all streams together; passing one on through HTTP takes 0.2 to 0.5 ms


class AsyncLLM(FrontendOwner):
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
        self._limit = None if max_queued_requests is None else self.config.max_num_seqs + max_queued_requests
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="specplug-encoder")
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # of the next five
        self._num_unfinished = 0
        self._reserved: dict[str, int] = {}  # the sequences of each unfinished request
        self._streams: dict[str, RequestStream] = {}
        self._is_draining = False
        self._error: EngineDeadError | None = None
        self._touched: dict[RequestStream, None] = {}  # used by the engine's thread alone, in this order
        self._thread = EngineThread(self.engine, after_step=self._wake_touched, on_failure=self._die)

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
            trace: fill in `CompletionOutput.steps`: in each step the draft, what became of it, probabilities and times.

        Raises:
            RequestError: the request can never be served, or the engine was closed.
            QueueFullError: too many requests are waiting.
            DeadlineExceededError: it did not end within `timeout`.
            GenerationError: it failed during generation; raised after the last output.
            EngineDeadError: the engine has stopped after an error.
        """
        self.check_capacity()
        encoded = await self.encode(prompt)
        if len(encoded) != 1:
            raise RequestError(f"generate takes one prompt, not {len(encoded)}; call it once for each, concurrently")
        request_ids = None if request_id is None else [request_id]
        streams = await self.submit(
            encoded,
            sampling_params,
            request_ids,
            lora_request=lora_request,
            output_kind=output_kind,
            timeout=timeout,
            trace=trace,
        )
        try:
            async for output in streams[0]:
                yield output
        finally:
            streams[0].close()

    async def encode(self, prompts: Prompt | Sequence[Prompt]) -> list[EncodedPrompt]:
        """One prompt or several → their ids, for `submit`.

        Raises:
            RequestError: a prompt is invalid; the message names its place.
        """
        return await self._in_encoder(self._frontend.encode, prompts)

    async def encode_plain(self, text: str) -> list[int]:
        """The ids of a text without the special tokens that the tokenizer adds to prompts; there may be none.

        Raises:
            RequestError: the text is invalid.
        """
        ids: list[int] = await self._in_encoder(self._frontend.encode_plain, text)
        return ids

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included.

        Raises:
            RequestError: an id is outside the vocabulary.
        """
        text: str = await self._in_encoder(self._frontend.decode, ids)
        return text

    async def render(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], **options: Any
    ) -> list[EncodedPrompt]:
        """One conversation or several → the texts of the chat template and their ids, for `submit`.

        Args:
            messages: see `LLM.chat`.
            options: of the tokenizer's `apply_chat_template`.

        Raises:
            RequestError: there is no template, or it cannot render the messages.
        """
        return await self._in_encoder(lambda: self._frontend.render(messages, **options))

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
        _check_timeout(timeout)
        arrival_time = time.monotonic()
        ids = [f"specplug-{next(self._numbers)}" for _ in encoded] if request_ids is None else list(request_ids)
        params = self._frontend.params_list(sampling_params, len(encoded))
        self._reserve({name: each.n for name, each in zip(ids, params, strict=True)}, len(ids))
        streams: list[RequestStream] = []
        try:
            submissions = await self._in_encoder(self._frontend.make, encoded, params, ids, lora_request)
            for submission in submissions:
                for request in submission.family:
                    request.arrival_time = arrival_time
                    request.is_traced = trace
                streams.append(self._stream(submission, output_kind))
            with self._lock:
                self._streams.update({stream.request_id: stream for stream in streams})
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
        with self._lock:
            stream = self._streams.get(request_id)
        if stream is None or stream.has_ended:
            return False
        stream.abort()
        return True

    def abort_all(self) -> None:
        """Ends all requests."""
        with self._lock:
            streams = list(self._streams.values())
        for stream in streams:
            stream.abort()

    def _stream(self, submission: Submission, kind: OutputKind) -> RequestStream:
        return RequestStream(
            submission,
            self._frontend,
            kind=kind,
            touch=self._touch,
            abort=lambda name: self._thread.run_soon(lambda: self._abort(name)),
            ended=lambda stream: self._forget(stream.request_id),
            observers=self._observers,
        )

    async def _in_encoder(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            future = self._encoder.submit(function, *arguments)
        except RuntimeError as error:
            raise RequestError("the engine is closed") from error
        return await asyncio.wrap_future(future)

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
        return self._num_unfinished

    def check_capacity(self) -> None:
        """Refuses a request that the queue has no room for, before work is done for it.

        Raises:
            QueueFullError: too many requests are waiting, or the engine is draining.
            EngineDeadError: the engine has stopped after an error.
        """
        self.check_health()
        if self._is_draining:
            raise QueueFullError("the engine is shutting down and takes no more requests")
        if self._limit is not None and self._num_unfinished >= self._limit:
            raise QueueFullError(
                f"{self._num_unfinished} sequences are running or waiting, and the limit is {self._limit} "
                f"(max_num_seqs={self.config.max_num_seqs} plus max_queued_requests); try again later"
            )

    def _reserve(self, counts: Mapping[str, int], num_names: int) -> None:
        with self._lock:
            self.check_capacity()
            taken = next((name for name in counts if name in self._reserved), None)
            if taken is not None or len(counts) < num_names:
                raise RequestError(f"request_id={shown(taken or next(iter(counts)))} is already in use")
            self._reserved.update(counts)
            self._num_unfinished += sum(counts.values())

    def _forget(self, name: str) -> None:
        with self._lock:
            self._num_unfinished -= self._reserved.pop(name, 0)
            self._streams.pop(name, None)

    # ---- in the engine's thread -----------------------------------------------------------------------------------

    def _queue(self, streams: list[RequestStream]) -> None:
        try:
            self.engine.submit([stream.submission.family for stream in streams])
        except SpecplugError as error:
            for stream in streams:
                stream.fail(error)

    def _abort(self, name: str) -> None:
        self.engine.abort(name)

    def _touch(self, stream: RequestStream) -> None:
        self._touched[stream] = None

    def _wake_touched(self) -> None:
        """Tells every event loop once that outputs have arrived.

        Streams that were told too recently wait for a later step: otherwise many streams would spend more time on passing
        outputs on than the engine spends on a step. The first output and the last one never wait.
        """
        if not self._touched:
            return
        now, gap = time.monotonic(), _SECONDS_PER_OUTPUT * len(self._streams)
        due = [stream for stream in self._touched if stream.has_ended or now - stream.woken_at >= gap]
        by_loop: dict[asyncio.AbstractEventLoop, list[RequestStream]] = defaultdict(list)
        for stream in due:
            stream.woken_at = now
            del self._touched[stream]
            by_loop[stream.loop].append(stream)
        for loop, streams in by_loop.items():
            try:
                loop.call_soon_threadsafe(_notify, streams)
            except RuntimeError:  # the loop is closed: there is nobody to take the outputs
                for stream in streams:
                    stream.abort()

    def _die(self, error: BaseException) -> None:
        logger.error("the engine stopped after an error", exc_info=error)
        with self._lock:
            self._error = EngineDeadError(f"the engine stopped after an error: {one_line(error)}")
            streams = list(self._streams.values())
        for stream in streams:
            stream.fail(self._error)

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
        """
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
        with self._lock:
            self._is_draining = True
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._num_unfinished:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    def close(self) -> None:
        """Ends all requests and frees all memory; open streams end with an error. Safe to call twice."""
        self._thread.stop()
        self.engine.close()
        self._wake_touched()
        with self._lock:
            never_queued = list(self._streams.values())
        for stream in never_queued:
            stream.fail(RequestError(CLOSED))
        self._encoder.shutdown()

    shutdown = close

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


def _notify(streams: list[RequestStream]) -> None:
    for stream in streams:
        stream.notify()


def _check_timeout(value: Any) -> None:
    if value is not None and not (isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0):
        raise RequestError(f"timeout={shown(value)}: expected a positive number of seconds, or None")
