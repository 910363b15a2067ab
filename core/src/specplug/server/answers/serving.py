"""The life of one request for completions, whatever its choices look like: run it, then answer at once or in a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from specplug.errors import SpecplugError
from specplug.outputs import CompletionOutput, RequestOutput
from specplug.sampling.params import SamplingParams
from specplug.server.answers.accounting import Usage, speculation
from specplug.server.answers.events import Header, encode_json
from specplug.server.answers.generation import collect, interleave, start
from specplug.server.errors import api_error
from specplug.server.protocol.sampling import SamplingBody
from specplug.server.state import ServerState
from specplug.server.streaming import DONE, EventStream, unless_gone
from specplug.stats import SpeculationStats
from specplug.streams.stream import RequestStream
from specplug.text.prompts import EncodedPrompt


class Answer(Protocol):
    """What distinguishes completions from chat completions."""

    prefix: str
    """Of the `id` of a response."""
    whole: str
    """OpenAI's name of a response."""
    chunk: str
    """OpenAI's name of a part of a stream."""

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """A finished choice."""

    def opening(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The choices of the first chunk for a prompt; may be empty."""

    def delta(self, index: int, completion: CompletionOutput) -> dict[str, Any] | None:
        """The choice of a chunk; None if there is nothing to send."""

    def prepare(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """The outputs that a whole response shows and counts."""

    def more(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """More fields of a whole response."""


async def serve(
    state: ServerState,
    request: Request,
    body: SamplingBody,
    answer: Answer,
    *,
    num_prompts: int,
    encode: Callable[[], Awaitable[list[EncodedPrompt]]],
    params: Callable[[], SamplingParams],
) -> Response:
    """Serves a request.

    Args:
        state: the server's.
        request: the HTTP request; its body is read.
        body: its fields.
        answer: shapes the choices.
        num_prompts: how many prompts it has.
        encode: makes the prompts.
        params: makes the sampling parameters.

    Raises:
        ApiError: it cannot be served, or not now.
        ClientGoneError: the client left.
    """
    model = state.check_model(body.model)
    streams: list[RequestStream] = []
    with ExitStack() as stack:
        request_id, names = stack.enter_context(state.in_work(answer.prefix, body.request_id, num_prompts))
        stack.callback(_close, streams)

        async def submit() -> None:
            try:
                state.ready_engine.check_capacity()
                streams.extend(
                    await start(
                        state,
                        await encode(),
                        params(),
                        names,
                        kind="delta" if body.stream else "final_only",
                        timeout=body.timeout,
                        cache_salt=body.cache_salt,
                        adapter=state.adapter_of(model),
                    )
                )
            except SpecplugError as error:
                raise api_error(error, state.settings.retry_after) from error

        if not body.stream:

            async def run() -> Response:
                await submit()
                outputs = answer.prepare(await collect(streams, state.settings.retry_after))
                header = Header(request_id, answer.whole, model)
                return Response(encode_json(_whole(state, header, answer, outputs)), media_type="application/json")

            return await unless_gone(request, run())
        await unless_gone(request, submit())
        header = Header(request_id, answer.chunk, model)
        return EventStream(
            _events(state, header, body, answer, streams),
            send_timeout=state.settings.send_timeout,
            on_close=stack.pop_all().close,
        )


def _close(streams: list[RequestStream]) -> None:
    for stream in streams:
        stream.close()


def _whole(state: ServerState, header: Header, answer: Answer, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    choices = [
        answer.choice(index, output, completion)
        for index, output in enumerate(outputs)
        for completion in output.outputs
    ]
    more = answer.more(outputs)
    metrics = _metrics(state, [each.metrics for output in outputs for each in output.outputs])
    if metrics is not None:
        more["metrics"] = metrics
    return header.response(choices, usage=Usage.of(outputs).as_json(), **more)


def _metrics(state: ServerState, stats: Sequence[SpeculationStats]) -> dict[str, Any] | None:
    config = state.engine.config.speculative
    return speculation(
        stats, state.settings.speculative_metrics, 0 if config is None else config.num_speculative_tokens
    )


async def _events(
    state: ServerState, header: Header, body: SamplingBody, answer: Answer, streams: list[RequestStream]
) -> AsyncGenerator[bytes, None]:
    """The events of a stream. What goes wrong after its beginning is an event too."""
    usage, opened, num_finished = Usage(), set[int](), 0
    options = body.stream_options
    counts_last = bool(options and options.include_usage)
    counts_always = bool(options and options.continuous_usage_stats)
    silent: dict[str, Any] = {"usage": None} if counts_last else {}
    try:
        async for index, output in interleave(streams):
            parts: list[dict[str, Any]] = []
            if index not in opened:
                opened.add(index)
                usage.add_prompt(output)
                parts += answer.opening(index, output)
            for completion in output.outputs:
                usage.completion_tokens += len(completion.token_ids)
                part = answer.delta(index, completion) if completion.error is None else None
                if part is not None:
                    parts.append(part)
            num_finished += output.finished
            more = {"usage": usage.as_json()} if counts_always else silent
            if parts and num_finished == len(streams):
                metrics = _metrics(state, [each.stats for stream in streams for each in stream.submission.family])
                more = more if metrics is None else {**more, "metrics": metrics}
            if parts:
                chunks = [header.event([part], **silent) for part in parts[:-1]]
                yield b"".join([*chunks, header.event(parts[-1:], **more)])
    except SpecplugError as error:
        yield api_error(error, state.settings.retry_after).event
        yield DONE
        return
    if counts_last:
        yield header.event([], usage=usage.as_json())
    yield DONE
