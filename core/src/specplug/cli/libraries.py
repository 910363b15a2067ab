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

    from specplug.config.engine import EngineConfig

INTERRUPTED = 130
_MODULES = ("specplug.llm", "transformers.modeling_utils", "transformers.models.auto.modeling_auto")


def check_plugins(config: EngineConfig) -> None:
    """Refuses methods that cannot be used and keys that they do not know, before seconds are spent on importing the rest.

    Raises:
        SpecplugError: with what is wrong.
    """
    from specplug.plugins.registry import PluginRegistry

    is_first = "torch" not in sys.modules  # a plugin may be what imports it
    with _importing() if is_first else contextlib.nullcontext():
        PluginRegistry(config.allowed_plugins, config.denied_plugins, config.plugins).check(config.speculative)


def import_libraries() -> None:
    """Imports what every start needs, so that the startup steps show what they cost themselves."""
    missing = [name for name in _MODULES if name not in sys.modules]
    if not missing:
        return
    with _importing():
        for name in missing:
            importlib.import_module(name)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    with _ending_at_once(), _without_collecting(), threads.importing():
        yield


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
    with contextlib.suppress(OSError):
        os.write(2, b"specplug: interrupted\n")
    os._exit(INTERRUPTED)
