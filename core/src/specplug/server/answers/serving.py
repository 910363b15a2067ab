"""The life of one request, whatever its response looks like: run it, then answer at once or in a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from specplug.errors import SpecplugError
from specplug.outputs import RequestOutput
from specplug.sampling.params import SamplingParams
from specplug.server.answers.events import encode_json
from specplug.server.answers.generation import collect, start
from specplug.server.errors import api_error
from specplug.server.protocol.sampling import SamplingBody
from specplug.server.state import ServerState
from specplug.server.streaming import EventStream, unless_gone
from specplug.streams.stream import RequestStream
from specplug.text.prompts import EncodedPrompt


class Reply(Protocol):
    """What distinguishes the endpoints."""

    prefix: str
    """Of the `id` of a response."""

    async def encode(self) -> list[EncodedPrompt]:
        """The prompts of the request."""

    def params(self) -> SamplingParams:
        """Its sampling parameters."""

    def whole(self, request_id: str, model: str, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The response, once everything is generated."""

    def events(self, request_id: str, model: str, streams: list[RequestStream]) -> AsyncGenerator[bytes, None]:
        """The response as server-sent events. What goes wrong after its beginning is an event too."""


async def serve(
    state: ServerState, request: Request, body: SamplingBody, reply: Reply, *, num_prompts: int = 1
) -> Response:
    """Serves a request.

    Args:
        state: the server's.
        request: the HTTP request; its body is read.
        body: its fields.
        reply: makes the prompts, and shapes the response.
        num_prompts: how many prompts it has.

    Raises:
        ApiError: it cannot be served, or not now.
        ClientGoneError: the client left.
    """
    model = state.check_model(body.model)
    streams: list[RequestStream] = []
    with ExitStack() as stack:
        request_id, names = stack.enter_context(state.in_work(reply.prefix, body.request_id, num_prompts))
        stack.callback(_close, streams)

        async def submit() -> None:
            try:
                state.ready_engine.check_capacity()
                streams.extend(
                    await start(
                        state,
                        await reply.encode(),
                        reply.params(),
                        names,
                        kind="delta" if body.stream else "final_only",
                        timeout=body.timeout,
                        cache_salt=body.cache_salt,
                        priority=body.priority,
                        adapter=state.adapter_of(model),
                    )
                )
            except SpecplugError as error:
                raise api_error(error, state.settings.retry_after) from error

        if not body.stream:

            async def run() -> Response:
                await submit()
                outputs = await collect(streams, state.settings.retry_after)
                content = encode_json(reply.whole(request_id, model, outputs))
                return Response(content, media_type="application/json")

            return await unless_gone(request, run())
        await unless_gone(request, submit())
        return EventStream(
            reply.events(request_id, model, streams),
            send_timeout=state.settings.send_timeout,
            on_close=stack.pop_all().close,
        )


def _close(streams: list[RequestStream]) -> None:
    for stream in streams:
        stream.close()
