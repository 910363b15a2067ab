"""The six startup steps, shown as they run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

    from specplug.cli.terminal import Terminal
    from specplug.engine.startup.report import StepReport

_STEPS = 6
_NAME_WIDTH = 36


class StartupView:
    """Prints one line per step, with its time; on a terminal also while the step runs.

    It is a context manager around the start: a step that fails is marked.

    Args:
        terminal: receives the lines.
        quiet: print nothing.
    """

    def __init__(self, terminal: Terminal, *, quiet: bool = False) -> None:
        self._terminal = terminal
        self._quiet = quiet
        self._open: StepReport | None = None

    def __enter__(self) -> Self:
        return self

    def announce(self, text: str) -> None:
        """Shows what happens before the first step; the line of that step replaces it."""
        if self._terminal.is_live and not self._quiet:
            self._terminal.write(f"  {text}", "dim")

    def __call__(self, report: StepReport) -> None:
        """Shows a report of `start_engine`."""
        if self._quiet:
            return
        self._open = report if report.seconds is None else None
        if report.seconds is not None:
            self._show(report, f"{report.seconds:7.2f} s", end="\n")
        elif self._terminal.is_live:
            elapsed = f"{report.elapsed:7.0f} s so far" if report.elapsed else ""
            self._show(report, f"{report.fraction:7.0%}" if report.fraction else elapsed, end="")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None and error is not None:
            self._show(self._open, "failed" if isinstance(error, Exception) else "interrupted", end="\n")

    def _show(self, report: StepReport, state: str, end: str) -> None:
        self._terminal.rewind()
        self._terminal.write(f"  {report.number}/{_STEPS} {report.name:<{_NAME_WIDTH}}{state}{end}", "dim")
