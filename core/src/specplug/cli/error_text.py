"""Errors as one line of text."""

from __future__ import annotations

from specplug.errors import SpecplugError


def describe_error(error: BaseException) -> str:
    """An error's text with its notes, such as the startup step that failed; an unexpected error's type comes first."""
    text = " ".join(str(error).split())
    if not isinstance(error, SpecplugError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    notes = "; ".join(" ".join(note.split()) for note in getattr(error, "__notes__", ()))
    return f"{text} ({notes})" if notes else text
