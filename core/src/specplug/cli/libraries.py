"""Importing PyTorch and Transformers, which takes seconds."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERRUPTED = 130
_MODULES = ("specplug.llm", "transformers.modeling_utils", "transformers.models.auto.modeling_auto")


def import_libraries() -> None:
    """Imports what every start needs, so that the startup steps show what they cost themselves."""
    with _ending_at_once():
        for name in _MODULES:
            importlib.import_module(name)


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """Lets Ctrl-C end the process here and now: libraries swallow it while they are imported, and nothing is lost yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(*_: Any) -> None:
    os.write(2, b"specplug: interrupted\n")
    os._exit(INTERRUPTED)
