"""What goes between the ingress and a replica: a request, and the parts of its response."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator
from typing import Any

import attrs
from starlette.types import ASGIApp, Message, Scope

_CHARACTERS_OF_PROMPT = 1024


@attrs.frozen
class Forwarded:
    """A request.

    Attributes:
        scope: what ASGI says of it.
        body: all of it.
        prompt: its text, by which `PrefixCacheAffinityRouter` chooses a replica; never empty, as that router requires.
    """

    scope: dict[str, Any]
    body: bytes
    prompt: str


@attrs.frozen
class Head:
    """The beginning of a response."""

    status: int
    headers: list[tuple[bytes, bytes]]


def forwarded(scope: Scope, body: bytes, fields: Any) -> Forwarded:
    """Makes the request for a replica from the ingress's; `fields` is the body as JSON."""
    kept = ("type", "http_version", "method", "scheme", "path", "raw_path", "root_path", "query_string", "headers")
    plain = {key: scope[key] for key in kept if key in scope} | {"client": None, "server": None}
    return Forwarded(plain, body, _text(fields) or str(scope["path"]))


def conversation_of(fields: Any, session: str | None) -> str:
    """The key of a conversation: requests with the same key can use the same cached KV.

    Args:
        fields: the body.
        session: the client's own name for the conversation.

    Returns:
        The session if there is one; else a digest of the messages up to the first of the user, or of the beginning of the
        prompt. Empty if there is neither.
    """
    if session:
        return session
    if not isinstance(fields, dict):
        return ""
    messages = fields.get("messages")
    if isinstance(messages, list) and messages:
        roles = [each.get("role") if isinstance(each, dict) else None for each in messages]
        start: Any = messages[: roles.index("user") + 1] if "user" in roles else messages
    else:
        start = _text(fields)[:_CHARACTERS_OF_PROMPT]
    if not start:
        return ""
    return hashlib.sha256(json.dumps(start, sort_keys=True).encode()).hexdigest()[:32]


def _text(fields: Any) -> str:
    """The prompt of a body as text: ids are written as numbers."""
    if not isinstance(fields, dict):
        return ""
    value = fields.get("messages", fields.get("prompt"))
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) and value else ""


async def respond(app: ASGIApp, request: Forwarded) -> AsyncGenerator[Head | bytes, None]:
    """Runs an ASGI application on a request; yields the head of its response, then the parts of its body.

    Closing the generator ends the request, as a client that disconnects does.
    """
    parts: asyncio.Queue[Message | None] = asyncio.Queue()  # Ray takes parts at once, whatever the client does
    given = [{"type": "http.request", "body": request.body, "more_body": False}]
    never = asyncio.Event()

    async def receive() -> Message:
        if given:
            return given.pop()
        await never.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app({**request.scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, parts.put)
        finally:
            parts.put_nowait(None)

    task = asyncio.ensure_future(run())
    try:
        while (message := await parts.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(message["status"], list(message["headers"]))
            elif body := message.get("body"):
                yield bytes(body)
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
