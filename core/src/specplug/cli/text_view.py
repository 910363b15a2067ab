"""Showing generated text, coloured by who drafted it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from specplug.cli.terminal import DRAFTER_STYLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specplug.cli.terminal import Terminal
    from specplug.llm import StreamedPiece


class TextView:
    """Writes streamed pieces. Where there is colour, accepted draft tokens have their method's, the target's own none.

    Args:
        terminal: where to.
        methods: the methods of the chain, in order.
        indent: put before every line.
    """

    def __init__(self, terminal: Terminal, methods: Sequence[str], indent: str = "") -> None:
        self._terminal = terminal
        self._styles = {method: DRAFTER_STYLES[i % len(DRAFTER_STYLES)] for i, method in enumerate(methods)}
        self._indent = indent
        self._at_line_start = True

    def prompt(self, text: str) -> None:
        """Writes a prompt, so that what is generated goes on from its last character."""
        self._write(text, "dim")

    def show(self, piece: StreamedPiece) -> None:
        """Writes the text of a piece."""
        tokens = zip(piece.sources, piece.token_texts, strict=True)
        for source, run in itertools.groupby(tokens, key=lambda token: token[0]):
            self._write("".join(text for _, text in run), self._styles.get(source, "") if source else "")

    def _write(self, text: str, style: str) -> None:
        for line in text.splitlines(keepends=True):
            if self._at_line_start:
                self._terminal.write(self._indent if line.strip("\r\n") else self._indent.rstrip())
            self._terminal.generated(line, style)
            self._at_line_start = line.endswith(("\n", "\r"))

    def close(self) -> None:
        """Ends the last line."""
        if not self._at_line_start:
            self._terminal.line()
            self._at_line_start = True

    @property
    def legend(self) -> str:
        """What the colours mean; empty without colours or drafters."""
        if not self._styles or not self._terminal.has_colour:
            return ""
        colours = ", ".join(f"{style}: drafted by {method}" for method, style in self._styles.items())
        return f"{colours}; the rest is the target's own"
