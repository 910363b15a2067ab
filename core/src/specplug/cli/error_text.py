"""Errors as one line of text."""

from __future__ import annotations

from specplug.errors import CheckpointError, ConfigurationError, RequestError, SpecplugError

_WITH_DETAILS = "(details: run again with --debug)"


def describe_error(error: BaseException) -> str:
    """Returns the text of an error with its notes, such as the failed startup step; unexpected errors begin with their type."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif not isinstance(error, SpecplugError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    notes = "; ".join(" ".join(note.split()) for note in getattr(error, "__notes__", ()))
    return f"{text} ({notes})" if notes else text


def hint_at_details(error: BaseException) -> str:
    """Returns a hint at `--debug`, with a space before it, if a traceback says more than the message; else an empty string."""
    return f" {_WITH_DETAILS}" if _is_unexpected(error) else ""


def _is_unexpected(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return False
    if not isinstance(error, SpecplugError):
        return True
    cause = error.__cause__
    if cause is None or isinstance(error, (ConfigurationError, RequestError)):
        return False  # the cause is what the user wrote
    if isinstance(error, CheckpointError) and isinstance(cause, ValueError):
        return False  # the file is damaged
    return not isinstance(cause, (SpecplugError, OSError))
