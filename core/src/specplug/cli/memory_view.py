"""Drawing a memory plan: its five parts to scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specplug.cli.terminal import Terminal
    from specplug.memory.plan import MemoryPlan

_BAR_WIDTH = 30
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def show_memory(terminal: Terminal, plan: MemoryPlan) -> None:
    """Prints the parts of a plan with bars, bytes and shares of the whole."""
    from specplug.memory.plan import format_bytes

    smooth = terminal.can_show(_EIGHTHS)
    total = max(plan.total_bytes, 1)
    terminal.line(f"Memory plan: {format_bytes(plan.total_bytes)} of a budget of {format_bytes(plan.budget_bytes)}")
    for name, size in plan.parts:
        bar = draw_bar(size / total, _BAR_WIDTH, smooth=smooth)
        terminal.write(f"  {name:<22}")
        terminal.write(f"{bar:<{_BAR_WIDTH}}", "blue")
        terminal.line(f"{format_bytes(size):>11}  {size / total:4.0%}")


def draw_bar(share: float, width: int, *, smooth: bool) -> str:
    """A bar of a share of `width` columns; a share above zero always shows.

    Args:
        share: between 0 and 1.
        width: columns of a whole.
        smooth: draw eighths of a column with block characters, else whole columns with `#`.
    """
    if share <= 0:
        return ""
    if not smooth:
        return "#" * max(1, round(share * width))
    full, part = divmod(max(1, round(share * width * 8)), 8)
    return "█" * full + (_EIGHTHS[part] if part else "")
