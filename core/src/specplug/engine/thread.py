"""A thread that runs an engine's steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specplug.engine.engine import Engine


class EngineThread:
    """Steps an engine while it has work. Other threads give it tasks, which run between steps, in order.

    Args:
        engine: the engine. Nobody else may step it, or queue requests in it without `run_soon`.
        after_step: called after every step and every batch of tasks, in this thread.
        on_failure: called once if a step or a task raises, in this thread, which then ends.
    """

    def __init__(
        self, engine: Engine, *, after_step: Callable[[], None], on_failure: Callable[[BaseException], None]
    ) -> None:
        self._engine = engine
        self._after_step = after_step
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._tasks: deque[Callable[[], None]] = deque()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="specplug-engine", daemon=True)
        self._thread.start()

    def run_soon(self, task: Callable[[], None]) -> bool:
        """Has the thread run a short task before the next step; never waits. False if the thread has ended or is ending."""
        with self._changed:
            if self._is_stopping:
                return False
            self._tasks.append(task)
            self._changed.notify()
            return True

    def stop(self) -> None:
        """Waits for the current step and ends the thread. Safe to call twice."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                while self._tasks:
                    self._tasks.popleft()()
                if self._engine.has_unfinished_requests:
                    self._engine.step()
                self._after_step()
        except BaseException as error:
            with self._changed:
                self._is_stopping = True
            self._on_failure(error)

    def _wait(self) -> bool:
        """Waits for something to do; False if there is nothing more."""
        with self._changed:
            while not (self._is_stopping or self._tasks or self._engine.has_unfinished_requests):
                self._changed.wait()
            return not self._is_stopping
