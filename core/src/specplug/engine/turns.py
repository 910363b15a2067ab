"""Who works on an engine: one thread at a time, in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from specplug.errors import RequestError


class Turns:
    """A fair lock around an engine: `with turns:`. A thread that has it and asks again gets an error, never a deadlock."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[object] = deque()
        self._holder: int | None = None
        self._later: deque[Callable[[], object]] = deque()

    def __enter__(self) -> None:
        """Waits for the turn.

        Raises:
            RequestError: this thread has it: a hook called the engine that called it.
        """
        me, ticket = threading.get_ident(), object()
        if self._holder == me:
            raise RequestError(
                "the engine was called from within one of its own steps, by a hook or a callback; "
                "call it when the step is over, or use another engine"
            )
        with self._changed:
            self._queue.append(ticket)
            try:
                while self._holder is not None or self._queue[0] is not ticket:
                    self._changed.wait()
                self._holder = me
            except BaseException:
                self._changed.notify_all()
                raise
            finally:
                self._queue.remove(ticket)

    def __exit__(self, *_: object) -> None:
        try:
            while self._later:
                self._later.popleft()()
        finally:
            with self._changed:
                self._holder = None
                self._changed.notify_all()
        self._run_later()

    def later(self, errand: Callable[[], object]) -> None:
        """Runs a short errand as soon as nobody has the turn, in whatever thread; never waits.

        For finalisers: the garbage collector runs them anywhere, even inside a step of the same thread.
        """
        self._later.append(errand)
        self._run_later()

    def _run_later(self) -> None:
        """Whoever has the turn, or is just passing it on, looks for errands afterwards."""
        while self._later and self._changed.acquire(blocking=False):
            try:
                if self._holder is not None:
                    return
                self._holder = threading.get_ident()
            finally:
                self._changed.release()
            self.__exit__()
