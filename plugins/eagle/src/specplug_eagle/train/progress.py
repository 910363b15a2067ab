"""Progress of a long run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_EVERY = 20.0


class Reporter:
    """Shows one task at a time on standard error, and permanent lines between."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: tuple[str, int] | None = None
        self._id = self._progress.add_task("", visible=False)
        self._last = 0.0

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        """Prints a permanent line."""
        if self._console.is_terminal:
            self._console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """Updates a task's progress."""
        if (name, total) != self._task:
            self._task = name, total
            self._progress.reset(self._id, total=total, completed=done, visible=True)
        text = f"{name} {note}".strip()
        self._progress.update(self._id, description=text, completed=done)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last > _EVERY or done == total):
            self._last = now
            self.line(f"{name} {done}/{total} {note}".strip())
