"""Plain tables: aligned columns, separated by two spaces."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from specplug.cli.terminal import Terminal

_GAP = "  "
_MIN_LAST_WIDTH = 20
_MIN_WRAP_WIDTH = 8


class Table:
    """Rows of text under a header. Nothing is truncated: on a terminal, the last column wraps.

    Columns that do not fit a terminal follow in further tables, which repeat the first column.

    Args:
        header: names of the columns.
        rows: cells.
        right: indices of right-aligned columns.
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
            terminal: receives the table.
            style: returns the style of a cell by its row and column.
            below: called with the index of each row after it was printed.
        """
        parts = self._parts(terminal)
        for part in parts:
            if part is not parts[0]:
                terminal.line()
            self._show_row(terminal, part, self._header, ["bold"] * len(self._header))
            for index, cells in enumerate(self._rows):
                self._show_row(terminal, part, cells, [style(index, column) for column in range(len(cells))])
                if part is parts[-1]:
                    below(index)

    def _parts(self, terminal: Terminal) -> list[list[int]]:
        """Returns the columns of each table; a single table if all columns fit."""
        columns = list(range(len(self._widths)))
        if terminal.width is None:
            return [columns]
        parts = [columns[:1]]
        for column in columns[1:]:
            before = sum(self._widths[each] + len(_GAP) for each in parts[-1])
            needed = self._widths[column]
            if column == columns[-1]:  # which may wrap
                needed = min(needed, _MIN_LAST_WIDTH)
            if before + needed > terminal.width and len(parts[-1]) > 1:
                parts.append([0])
            parts[-1].append(column)
        return parts

    def _show_row(self, terminal: Terminal, part: Sequence[int], cells: Sequence[str], styles: Sequence[str]) -> None:
        last = part[-1]
        indent = sum(self._widths[column] + len(_GAP) for column in part[:-1])
        for column in part[:-1]:
            padding = " " * (self._widths[column] - len(cells[column]))
            before, after = (padding, "") if column in self._right else ("", padding)
            terminal.write(before)
            terminal.write(cells[column], styles[column])
            if cells[last] or column != part[-2]:
                terminal.write(after + _GAP)
        lines = self._last_cell(terminal, cells[last], last, indent)
        terminal.line(f"\n{' ' * indent}".join(lines), styles[last])

    def _last_cell(self, terminal: Terminal, text: str, column: int, indent: int) -> list[str]:
        if terminal.width is None or indent + len(text) <= terminal.width:
            return [text.rjust(self._widths[column]) if column in self._right else text]
        return textwrap.wrap(text, max(terminal.width - indent, _MIN_WRAP_WIDTH)) or [""]
