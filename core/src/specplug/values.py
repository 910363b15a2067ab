"""Values as callers have them: NumPy and torch numbers, and strings that are no valid text."""

from __future__ import annotations

from typing import Any


def to_python(value: Any) -> Any:
    """NumPy and torch values (everything with `tolist`) as Python's numbers and lists; any other value as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def text_fault(text: str) -> str | None:
    """What keeps a string from being valid Unicode text, or None.

    A lone surrogate stands in strings for what could not be decoded, or comes from half of a JSON escape.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = (
            f"the byte 0x{code - 0xDC00:02X}, which is not UTF-8," if 0xDC80 <= code <= 0xDCFF else "a lone surrogate"
        )
        return f"{what} at character {error.start + 1} ({text[error.start]!a})"
    return None
