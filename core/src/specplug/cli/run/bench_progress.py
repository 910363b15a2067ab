"""The progress of `specplug bench`: the startup steps of each contestant, then a bar with the remaining time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from specplug.bench.comparison import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from specplug.bench.contestants import Contestant, OnStep
    from specplug.bench.workload import Cell
    from specplug.cli.terminal import Terminal
    from specplug.cli.views.startup import StartupView

_SPEED_SECONDS = 300.0  # contestants differ in speed: the rate is an average over several of them


class BenchProgress:
    """Shows progress; a context manager around the measurement.

    Args:
        terminal: shows a bar if it is live.
        view: shows startup steps.
        total: returns the number of tokens that will be generated, as far as it is known.
        repetitions: of each measurement.
        quiet: show nothing.
    """

    def __init__(
        self, terminal: Terminal, view: StartupView, total: Callable[[], int], repetitions: int, *, quiet: bool
    ) -> None:
        self._terminal = terminal
        self._view = view
        self._total = total
        self._repetitions = repetitions
        self._quiet = quiet
        self._bar: Any = None
        self._is_running = False
        self.watcher = Watcher(self._on_open, self._on_run, self._advance)

    def __enter__(self) -> Self:
        return self

    def _on_open(self, contestant: Contestant) -> OnStep:
        if self._is_running:
            self._describe(f"starting {contestant.label}")
            return lambda report: None
        if not self._quiet:
            self._terminal.rewind()
            self._terminal.line(contestant.label, "bold")
        return self._view

    def _on_run(self, contestant: Contestant, cell: Cell, repetition: int) -> None:
        if not self._is_running:
            self._is_running = True
            self._start()
        what = f"repetition {repetition} of {self._repetitions}" if repetition else "warming up"
        self._describe(f"{contestant.label}, {cell}: {what}")

    def _start(self) -> None:
        if self._quiet or not self._terminal.is_live:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        console = Console(file=self._terminal.stream)
        self._bar = Progress(*columns, console=console, transient=True, speed_estimate_period=_SPEED_SECONDS)
        self._task = self._bar.add_task("", total=self._total())
        self._bar.start()

    def _describe(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text, total=self._total())

    def _advance(self, tokens: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
