"""How far `specplug bench` is: the startup steps of every contestant, then one bar with the remaining time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from specplug.bench.comparison import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from specplug.bench.contestant import Contestant, OnStep
    from specplug.bench.workload import Cell
    from specplug.cli.startup_view import StartupView
    from specplug.cli.terminal import Terminal

_SPEED_SECONDS = 300.0  # contestants differ in speed: the rate is taken over several of them


class BenchProgress:
    """Use it as a context manager around the measurement.

    Args:
        terminal: where to; there is a bar where it is live.
        view: shows startup steps.
        total: gives the tokens that will be generated, as far as that is known.
        repetitions: of every measurement.
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
