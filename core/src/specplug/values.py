"""Values that come from users and plugins: numbers of any library, invalid text, and attrs fields that say what they expect."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

_LONGEST = 120  # characters of a value in a message


def as_integer(value: Any) -> Any:
    """An integer of any library → int; anything else, booleans included, as it is, for a check to refuse."""
    if type(value) is int or isinstance(value, bool) or getattr(value, "shape", ()) != ():
        return value
    if "bool" in str(getattr(value, "dtype", "")):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def is_integer(value: Any, least: int | None = None) -> bool:
    """Whether the value is an int, no boolean, and not below `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def as_tuple(value: Any) -> Any:
    """Several things → a tuple of them; text, mappings and single things as they are, for a check to refuse."""
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        return value
    return tuple(value)


def shown(value: Any) -> str:
    """The value as it is written in a message: in one line, and not longer than a line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the value is a plugin's or a user's own, and so is its repr
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def expect(holds: Callable[[Any], bool], expected: str, error: type[Exception]) -> Callable[[Any, Any, Any], None]:
    """An attrs validator that names the field, its value and what was expected.

    Args:
        holds: whether a value is right. A TypeError or ValueError in it means that it is not.
        expected: what a right value is.
        error: what is raised. A ValueError also names the class, for those who see only the message.
    """

    def validate(instance: Any, attribute: Any, value: Any) -> None:
        try:
            right = holds(value)
        except (TypeError, ValueError):
            right = False
        if not right:
            where = f"{type(instance).__name__}: " if error is ValueError else ""
            raise error(f"{where}{attribute.name}={shown(value)}: expected {expected}")

    return validate


def integer(least: int | None, error: type[Exception], *, or_none: bool = False) -> dict[str, Any]:
    """Converter and validator of an attrs field that holds an integer, for `attrs.field(**integer(...))`."""
    text = "an integer" if least is None else f"an integer of at least {least}"
    return {
        "converter": as_integer,
        "validator": expect(
            lambda value: (or_none and value is None) or is_integer(value, least),
            text + (", or None" if or_none else ""),
            error,
        ),
    }


def flag(error: type[Exception]) -> dict[str, Any]:
    """Validator of an attrs field that is True or False."""
    return {"validator": expect(lambda value: isinstance(value, bool), "True or False", error)}


def one_of(choices: Iterable[str], error: type[Exception]) -> dict[str, Any]:
    """Validator of an attrs field that is one of some names."""
    names = tuple(choices)
    text = " or ".join(repr(name) for name in names)
    return {"validator": expect(lambda value: isinstance(value, str) and value in names, text, error)}


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
