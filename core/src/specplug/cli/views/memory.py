"""A memory plan as bars: its parts to scale, and the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specplug.cli.terminal import Terminal
    from specplug.engine.memory_plan import MemoryPlan

_BAR_WIDTH = 30
_MIN_BAR_WIDTH = 5
_BUDGET_WIDTH = 70
_NAME_WIDTH = 22
_ROW_WIDTH = 41  # of the line of a part, without the bar
_LOOKS = {  # of each part: colour, and letter where there is none
    "target weights": ("blue", "T"),
    "target KV cache": ("cyan", "K"),
    "recurrent state": ("red", "R"),
    "draft weights": ("magenta", "d"),
    "draft KV cache": ("yellow", "k"),
    "verification buffers": ("green", "v"),
    "LoRA adapters": ("white", "L"),
    "loading": ("white", "w"),
}
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def show_memory(terminal: Terminal, plan: MemoryPlan) -> None:
    """Prints the parts of a plan with bars, bytes and percentages."""
    from specplug.engine.memory_plan import format_bytes

    smooth = terminal.can_show(_EIGHTHS)
    total = max(plan.total_bytes, 1)
    terminal.paragraph(
        f"Memory plan: {format_bytes(plan.total_bytes)} of a budget of {format_bytes(plan.budget_bytes)}", indent="  "
    )
    width = _BAR_WIDTH if terminal.width is None else min(_BAR_WIDTH, terminal.width - _ROW_WIDTH)
    for name, size in plan.parts:
        if width < _MIN_BAR_WIDTH:
            terminal.line(f" {name:<20} {format_bytes(size):>10} {size / total:4.0%}")
            continue
        bar = draw_bar(size / total, width, smooth=smooth)
        terminal.write(f"  {name:<{_NAME_WIDTH}}")
        terminal.write(f"{bar:<{width}}", _LOOKS[name][0])
        terminal.line(f"{format_bytes(size):>11}  {size / total:4.0%}")


def show_budget(terminal: Terminal, plan: MemoryPlan) -> None:
    """Prints one bar of the whole budget: the parts, and what is left.

    The parts have the colours of `show_memory`; without colour, letters with a legend.
    """
    from specplug.engine.memory_plan import format_bytes

    coloured = terminal.has_colour and terminal.can_show("█░")
    left = max(plan.budget_bytes - plan.total_bytes, 0)
    sizes = [size for _, size in plan.parts]
    width = _BUDGET_WIDTH if terminal.width is None else min(_BUDGET_WIDTH, max(terminal.width, 40) - 2)
    *widths, rest = _columns([*sizes, left], width)
    share = left / plan.budget_bytes
    terminal.paragraph(
        f"Budget: {format_bytes(plan.budget_bytes)}, of which {format_bytes(left)} ({share:.0%}) are left", indent="  "
    )
    terminal.write("  ")
    looks = [_LOOKS[name] for name, _ in plan.parts]
    for width, (style, letter) in zip(widths, looks, strict=True):
        terminal.write(("█" if coloured else letter) * width, style)
    terminal.line(("░" if coloured else ".") * rest, "dim")
    if not coloured:
        legend = ", ".join([*(f"{_LOOKS[name][1]} {name}" for name, size in plan.parts if size), ". left"])
        terminal.paragraph(f"  {legend}", indent="  ")


def _columns(sizes: list[int], width: int) -> list[int]:
    """Divides `width` columns in proportion; every size above 0 gets at least one, at the cost of the largest."""
    total = max(sum(sizes), 1)
    columns = [max(1, round(size / total * width)) if size else 0 for size in sizes]
    columns[columns.index(max(columns))] += width - sum(columns)
    return columns


def draw_bar(share: float, width: int, *, smooth: bool) -> str:
    """Returns a bar of a share of `width` columns; a share above 0 is always visible.

    Args:
        share: between 0 and 1.
        width: columns of a full bar.
        smooth: draw eighths of a column with block characters; else whole columns of `#`.
    """
    if share <= 0:
        return ""
    if not smooth:
        return "#" * max(1, round(share * width))
    full, part = divmod(max(1, round(share * width * 8)), 8)
    return "█" * full + (_EIGHTHS[part] if part else "")
