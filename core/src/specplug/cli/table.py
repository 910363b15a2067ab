"""Plain tables: aligned columns, two spaces between them."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from specplug.cli.terminal import Terminal

_GAP = "  "
_LEAST_WIDTH = 20


class Table:
    """Rows of text under a header. Nothing is ever cut: on a terminal the last column wraps, elsewhere it is one line.

    Args:
        header: names of the columns.
        rows: cells.
        right: columns that are aligned to the right, by index.
    """

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
        self._header = header
        self._rows = rows
        self._right = set(right)
        self._widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def show(
        self,
        terminal: Terminal,
        style: Callable[[int, int], str] = lambda row, column: "",
        below: Callable[[int], None] = lambda row: None,
    ) -> None:
        """Prints the table.

        Args:
            terminal: where to.
            style: gives the style of a cell by its row and column.
            below: called with a row's index when the row was printed.
        """
        self._show_row(terminal, self._header, ["bold"] * len(self._header))
        for index, cells in enumerate(self._rows):
            self._show_row(terminal, cells, [style(index, column) for column in range(len(cells))])
            below(index)

    def _show_row(self, terminal: Terminal, cells: Sequence[str], styles: Sequence[str]) -> None:
        last = len(cells) - 1
        indent = sum(self._widths[:last]) + len(_GAP) * last
        for column, (cell, width) in enumerate(zip(cells[:last], self._widths, strict=False)):
            padding = " " * (width - len(cell))
            before, after = (padding, "") if column in self._right else ("", padding)
            terminal.write(before)
            terminal.write(cell, styles[column])
            if cells[-1] or column < last - 1:
                terminal.write(after + _GAP)
        lines = self._last_cell(terminal, cells[-1], indent)
        terminal.line(f"\n{' ' * indent}".join(lines), styles[last])

    def _last_cell(self, terminal: Terminal, text: str, indent: int) -> list[str]:
        if terminal.width is None or indent + len(text) <= terminal.width:
            return [text.rjust(self._widths[-1]) if len(self._widths) - 1 in self._right else text]
        return textwrap.wrap(text, max(terminal.width - indent, _LEAST_WIDTH)) or [""]
