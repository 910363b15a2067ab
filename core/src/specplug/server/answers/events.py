"""The JSON of responses: what all of them begin with, and server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import attrs
from pydantic_core import PydanticSerializationError, to_json

from specplug.version import __version__

_FINGERPRINT = f"specplug-{__version__}"


def encode_json(value: Any) -> bytes:
    """JSON in one line; what is not valid UTF-8 is replaced, and numbers that JSON lacks are null."""
    try:
        return to_json(value, inf_nan_mode="null")
    except PydanticSerializationError:  # half a surrogate pair
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode("utf-8", "replace")


@attrs.frozen
class Header:
    """What all parts of one response have in common.

    Attributes:
        id: of the response.
        object: OpenAI's name for what it is.
        model: the name of the model.
        created: seconds of the epoch.
        opening: all of that as the beginning of a JSON object; it is the same in all chunks of a stream.
    """

    id: str
    object: str
    model: str
    created: int = attrs.field(factory=lambda: int(time.time()))
    opening: bytes = attrs.field(
        init=False,
        repr=False,
        default=attrs.Factory(lambda self: b'data: %b,"choices":[' % encode_json(self._fields())[:-1], takes_self=True),
    )

    def response(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A whole response."""
        return {**self._fields(), "choices": choices, **more}

    def event(self, choices: Sequence[dict[str, Any]], **more: Any) -> bytes:
        """A chunk of a response as a server-sent event."""
        rest = b"," + encode_json(more)[1:-1] if more else b""
        return b"%b%b]%b}\n\n" % (self.opening, b",".join(map(encode_json, choices)), rest)

    def _fields(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": _FINGERPRINT,
        }
