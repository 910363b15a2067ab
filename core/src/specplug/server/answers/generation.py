"""Runs the prompts of one HTTP request: all of them together, until they end or the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

import attrs

from specplug.errors import SpecplugError
from specplug.outputs import RequestOutput
from specplug.sampling.params import SamplingParams
from specplug.server.errors import api_error
from specplug.server.state import ServerState
from specplug.streams.assembly import OutputKind
from specplug.streams.stream import RequestStream
from specplug.text.prompts import EncodedPrompt


async def start(
    state: ServerState,
    prompts: Sequence[EncodedPrompt],
    params: SamplingParams,
    names: Sequence[str],
    *,
    kind: OutputKind,
    timeout: float | None,
    cache_salt: str | None,
    priority: int | None = None,
    adapter: str | None = None,
    trace: bool = False,
) -> list[RequestStream]:
    """Queues the prompts of a request, for an adapter if it names one; `trace` asks for the details of each step.

    Raises:
        ApiError: it cannot be served, or not now.
    """
    limits = [each for each in (timeout, state.settings.request_timeout) if each is not None]
    try:
        return await state.ready_engine.submit(
            [attrs.evolve(prompt, cache_salt=cache_salt, priority=priority or 0) for prompt in prompts],
            params,
            names,
            lora_request=adapter,
            output_kind=kind,
            timeout=min(limits, default=None),
            trace=trace,
        )
    except SpecplugError as error:
        raise api_error(error, state.settings.retry_after) from error


async def collect(streams: Sequence[RequestStream], retry_after: int) -> list[RequestOutput]:
    """The last output of each stream.

    Raises:
        ApiError: a prompt failed.
    """
    try:
        return [output for stream in streams async for output in stream if output.finished]
    except SpecplugError as error:
        raise api_error(error, retry_after) from error
    finally:
        for stream in streams:
            stream.close()


async def interleave(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs of several streams as they come, each with the index of its stream.

    Raises:
        SpecplugError: a prompt failed.
    """
    try:
        if len(streams) == 1:
            async for output in streams[0]:
                yield 0, output
            return
        arrived: asyncio.Queue[tuple[int, RequestOutput | None, SpecplugError | None]] = asyncio.Queue()

        async def pump(index: int, stream: RequestStream) -> None:
            try:
                async for output in stream:
                    arrived.put_nowait((index, output, None))
            except SpecplugError as error:
                arrived.put_nowait((index, None, error))
            else:
                arrived.put_nowait((index, None, None))

        tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
        try:
            running = len(streams)
            while running:
                index, arrival, error = await arrived.get()
                if error is not None:
                    raise error
                if arrival is None:
                    running -= 1
                else:
                    yield index, arrival
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task
    finally:
        for stream in streams:
            stream.close()
