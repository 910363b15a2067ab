"""One thread at a time works on an engine, in the order of arrival."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from specplug.errors import RequestError


class FairLock:
    """A first-come, first-served lock: `with lock:`. A thread that holds it and asks again gets an error, not a deadlock.

    So does a forked process, which has a copy of the lock and none of the threads that would release it.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[object] = deque()
        self._holder: int | None = None
        self._deferred: deque[Callable[[], object]] = deque()
        self._process = os.getpid()

    def __enter__(self) -> None:
        """Waits for the lock.

        Raises:
            RequestError: this thread holds it: a hook called the engine that called it. Or this process was forked.
        """
        self.check_process()
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
            while self._deferred:
                self._deferred.popleft()()
        finally:
            with self._changed:
                self._holder = None
                self._changed.notify_all()
        self._run_deferred()

    @property
    def is_forked(self) -> bool:
        """Whether this process is not the one that made the lock."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Refuses a forked process: it has no compute threads, and would wait for them forever.

        Raises:
            RequestError: this process was forked from the one that made the lock.
        """
        if self.is_forked:
            raise RequestError(
                f"the engine belongs to process {self._process}, from which this one was forked; start an engine in this "
                "process, with multiprocessing's start method 'spawn'"
            )

    def defer(self, task: Callable[[], object]) -> None:
        """Runs a short task as soon as the lock is free, in any thread; never waits.

        For finalisers: the garbage collector runs them anywhere, even inside a step of the same thread.
        """
        if self.is_forked:
            return
        self._deferred.append(task)
        self._run_deferred()

    def _run_deferred(self) -> None:
        """Runs deferred tasks if the lock is free. Otherwise its holder runs them when it releases the lock."""
        while self._deferred and self._changed.acquire(blocking=False):
            try:
                if self._holder is not None:
                    return
                self._holder = threading.get_ident()
            finally:
                self._changed.release()
            self.__exit__()
