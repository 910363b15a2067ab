"""A progress bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ProgressBar:
    """A progress bar over finished completions; shown only on a terminal, and for more than one."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar: Any = None
        if shown and total > 1:
            from rich.console import Console
            from rich.progress import Progress

            console = Console(stderr=True)
            if console.is_terminal:
                self._bar = Progress(console=console, transient=True)
                self._task = self._bar.add_task("generating", total=total)

    def __enter__(self) -> Callable[[int], None]:
        if self._bar is None:
            return lambda finished: None
        self._bar.start()
        return lambda finished: self._bar.advance(self._task, finished)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
