"""JSON that people write by hand: errors name the place, and nothing is dropped silently."""

from __future__ import annotations

import json
from typing import Any

from specplug.errors import ConfigurationError


def parse_json(text: str, where: str, *, one_line: bool = False) -> Any:
    """Parses one JSON value.

    Args:
        text: the JSON.
        where: what it was given in, for messages.
        one_line: `where` names the line already.

    Raises:
        ConfigurationError: it is not valid JSON, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = "" if one_line else f"line {error.lineno}, "
        raise ConfigurationError(f"{where}: not valid JSON at {line}column {error.colno}: {error.msg}") from error
    except (_RepeatedKeyError, RecursionError, ValueError) as error:  # ValueError: an integer of too many digits
        raise ConfigurationError(f"{where}: {error}") from error


class _RepeatedKeyError(Exception):
    """A key that an object has twice: JSON readers would silently keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise _RepeatedKeyError(f"the key '{key}' is given twice")
        members[key] = value
    return members
