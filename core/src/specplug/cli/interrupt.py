"""Ctrl-C that is heard even when a library swallows it."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE = 0.5


@contextlib.contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Repeats an interrupt until it has left the block.

    Libraries import parts of themselves when they are first used, behind handlers that take any exception for a missing
    optional dependency: an interrupt that arrives just then would be lost, and a long generation go on.
    """
    inherited = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or inherited is signal.SIG_IGN:
        yield
        return
    heard = threading.Event()
    repeating: list[threading.Thread] = []

    def repeat() -> None:
        while not heard.wait(_PATIENCE):
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
        heard.set()
        signal.signal(signal.SIGINT, inherited)
