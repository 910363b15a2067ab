"""The JSON of responses: what all of them begin with, and server-sent events."""

from __future__ import annotations

import json
import time
from typing import Any

import attrs

from specplug.version import __version__

_FINGERPRINT = f"specplug-{__version__}"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(payload: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {_encode(payload)}\n\n".encode("utf-8", "replace")


@attrs.frozen
class Header:
    """What all parts of one response have in common.

    Attributes:
        id: of the response.
        object: OpenAI's name for what it is.
        model: the name of the model.
        created: seconds of the epoch.
    """

    id: str
    object: str
    model: str
    created: int = attrs.field(factory=lambda: int(time.time()))

    def response(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A response or a chunk of it."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": _FINGERPRINT,
            "choices": choices,
            **more,
        }
