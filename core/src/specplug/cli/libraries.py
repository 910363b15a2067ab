"""Importing PyTorch and Transformers, which takes seconds."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from specplug import threads

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERRUPTED = 130
_MODULES = ("specplug.llm", "transformers.modeling_utils", "transformers.models.auto.modeling_auto")


def import_libraries() -> None:
    """Imports what every start needs, so that the startup steps show what they cost themselves."""
    missing = [name for name in _MODULES if name not in sys.modules]
    if not missing:
        return
    with _ending_at_once(), _without_collecting(), threads.importing():
        for name in missing:
            importlib.import_module(name)


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Lets the collector of cycles rest: half a million new objects, nearly all of which stay, make it a tenth of the time.

    What has been imported is frozen afterwards, so that no later collection goes through it, for a third of a second, while
    requests wait.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


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
