"""What every request passes: the API key, the limits of its body, and the count of responses. Plain ASGI."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specplug.server.errors import ApiError
from specplug.server.metrics import ServerMetrics
from specplug.server.settings import ServerSettings

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", "/load"})
"""Those that need no API key: they are read by load balancers and monitoring, and reveal no text."""
_COUNTED = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/specplug/trace",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/abort",
        *OPEN_PATHS,
    }
)


def route_of(scope: Scope) -> str:
    """The path of a request, without the prefix that a proxy adds."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


class Authentication:
    """Lets a request pass if it has one of the API keys, or needs none.

    Args:
        app: what it guards.
        keys: the API keys.
        open_paths: paths that need none.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] == "http" and self._digests and not self._is_allowed(scope):
            message = "missing or wrong API key; send it as the header 'Authorization: Bearer KEY'"
            await ApiError(401, message, code="invalid_api_key").response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS" or route_of(scope) in self._open_paths:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        # Every key is compared, each in constant time: the time says nothing about any of them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return kind.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyLimits:
    """Reads the body of a request before anything else happens: not too much, not for too long, and only JSON.

    Only JSON, because pages of other origins may send everything else to a server on this machine without asking it.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._most = settings.max_body_bytes
        self._timeout = settings.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise ApiError(415, "the body must be JSON: send the header 'Content-Type: application/json'")
            declared = headers.get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > self._most:
                raise self._too_large()
            try:
                body = await asyncio.wait_for(self._read(receive), self._timeout)
            except TimeoutError as error:
                raise ApiError(408, f"the body did not arrive within {self._timeout:g} s") from error
        except ClientDisconnect:
            return
        except ApiError as error:
            response = error.response
            response.headers["Connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part = message.get("body", b"")
            size += len(part)
            if size > self._most:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most:,} bytes; see --max-body-size")


class ResponseCounter:
    """Counts responses by path and status."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = route_of(scope)
        path = route if route in _COUNTED else "other"

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_response(path, message["status"])
            await send(message)

        await self._app(scope, receive, count)
