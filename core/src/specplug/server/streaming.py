"""Responses that notice when their client goes away: server-sent events, and waiting for a result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client has closed its connection before it had a response."""


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks and waits until they have ended."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits work, and cancels it if the client disconnects.

    Raises:
        ClientGoneError: the client disconnected.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGoneError
    finally:
        await _end(watcher, worker)


class EventStream(Response):
    """Server-sent events, each sent as soon as it is there.

    The generator is closed when it is exhausted, when the client disconnects, or when the client reads nothing for too long.

    Args:
        events: encoded events; what it yields is sent at once.
        send_timeout: seconds after which a client that does not read is given up.
        on_close: called at the end, also if nothing was sent.
        media_type: of what they are encoded as.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        send_timeout: float,
        on_close: Callable[[], object] = lambda: None,
        media_type: str = media_type,
    ) -> None:
        self.media_type = media_type
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._send_timeout = send_timeout
        self._on_close = on_close
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        sender = asyncio.ensure_future(self._send(send))
        watcher = asyncio.ensure_future(_disconnected(receive))
        try:
            while not sender.done() and not watcher.done() and not self._is_stuck():
                await asyncio.wait(
                    {sender, watcher}, timeout=self._send_timeout / 4, return_when=asyncio.FIRST_COMPLETED
                )
            if sender.done():
                sender.result()
        finally:
            await _end(sender, watcher)
            await self._events.aclose()
            self._on_close()

    async def _send(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        self._sending_since = clock()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._sending_since = None
        async for event in self._events:
            self._sending_since = clock()
            await send({"type": "http.response.body", "body": event, "more_body": True})
            self._sending_since = None
        self._sending_since = clock()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _is_stuck(self) -> bool:
        now = asyncio.get_running_loop().time()
        return self._sending_since is not None and now - self._sending_since > self._send_timeout
