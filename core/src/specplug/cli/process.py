"""The process of a command: its streams, its imports, Ctrl-C, and its end."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import gc
import importlib
import io
import logging
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
"""The exit status after Ctrl-C, as shells use it."""
_MODULES = ("specplug.llm", "transformers.modeling_utils", "transformers.models.auto.modeling_auto")
_REPEAT_SECONDS = 0.5


class _ForgivingFile(io.FileIO):
    """A file that ignores failed writes: there is no reader, and nobody to report the failure to."""

    def write(self, data: Any, /) -> int:
        """Writes the data, or drops it."""
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def open_streams() -> None:
    """Opens the standard streams that the process lacks, and makes failed writes to standard error harmless.

    A stream that was closed (`2>&-`) becomes /dev/null, so that no other file gets its descriptor. A failed write to standard
    output (`| head`) stays an error.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: the one of the closed stream
            os.set_inheritable(number, True)
            stream = os.fdopen(number, mode, encoding="utf-8")
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _forgiving(sys.stderr)


def _forgiving(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    file: Any = _ForgivingFile(stream.fileno(), "w", closefd=False)
    file.name = stream.name
    return io.TextIOWrapper(io.BufferedWriter(file), encoding=stream.encoding, errors="replace", line_buffering=True)


def check_plugins(config: EngineConfig) -> None:
    """Refuses unusable methods and unknown keys before the slow imports begin.

    Raises:
        SpecplugError: a method cannot be used, or its keys are invalid.
    """
    from specplug.plugins.registry import PluginRegistry

    is_first = "torch" not in sys.modules  # a plugin may import it
    with _importing() if is_first else contextlib.nullcontext():
        PluginRegistry(config.allowed_plugins, config.denied_plugins, config.plugins).check(config.speculative)


def import_libraries() -> None:
    """Imports PyTorch and Transformers, so that the times of the startup steps do not contain it."""
    missing = [name for name in _MODULES if name not in sys.modules]
    if not missing:
        return
    with _importing():
        for name in missing:
            importlib.import_module(name)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    with _exit_on_interrupt(), _without_garbage_collection(), threads.importing():
        yield


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Disables the cyclic garbage collector: the imports create half a million objects, and nearly all of them stay.

    Collections make the imports a tenth slower. The objects are frozen afterwards: otherwise a later full collection would
    visit them for a third of a second while requests wait.
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
def _exit_on_interrupt() -> Iterator[None]:
    """Makes Ctrl-C end the process at once: libraries swallow it while they are imported, and there is nothing to save yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exit(*_: Any) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"specplug: interrupted\n")
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Repeats an interrupt until the block is left.

    Libraries import some modules on first use, inside handlers that treat every exception as a missing optional dependency.
    Such a handler would swallow an interrupt, and a long generation would continue.
    """
    inherited = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or inherited is signal.SIG_IGN:
        yield
        return
    left = threading.Event()
    repeating: list[threading.Thread] = []

    def repeat() -> None:
        while not left.wait(_REPEAT_SECONDS):
            _thread.interrupt_main(signal.SIGINT)

    def interrupt(*_: Any) -> None:
        if not repeating:
            repeating.append(threading.Thread(target=repeat, daemon=True))
            repeating[0].start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        left.set()
        signal.signal(signal.SIGINT, inherited)


@contextlib.contextmanager
def quick_end() -> Iterator[None]:
    """Ends the process right after its last exit handler, with the exit status of the block.

    The interpreter's own shutdown takes seconds once PyTorch is imported. Exit handlers that are registered inside the block
    still run: they are called in reverse order. Threads are joined before them, as usual.
    """
    status = 1  # of an exception; Python prints its traceback before any exit handler runs

    def end() -> None:
        if "torch" not in sys.modules:
            return
        try:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            return  # Python reports streams that cannot be written to
        os._exit(status)

    atexit.register(end)
    try:
        yield
        status = 0
    except SystemExit as end_of_command:
        code = end_of_command.code
        status = code if isinstance(code, int) else int(code is not None)
        raise
