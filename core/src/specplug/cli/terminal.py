"""Writing to a stream that may be a terminal or a file."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

DRAFTER_STYLES = ("green", "cyan", "magenta", "yellow", "blue", "red")
_NAMES = {"<stdout>": "standard output", "<stderr>": "standard error"}
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Terminal:
    """Writes text to a stream: coloured and wrapped on a terminal, plain and unwrapped elsewhere.

    Rich decides whether there is colour (`NO_COLOR`, `FORCE_COLOR`, `TERM`); it is imported only where there may be colour.

    Attributes:
        stream: receives the text.
        is_live: whether a line can be rewritten, as on a terminal.
        width: columns of the terminal; None for unlimited lines.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._console: Console | None = None
        if stream.isatty() or os.environ.get("FORCE_COLOR"):
            from rich.console import Console

            self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self.width = self._console.width if self._console is not None and stream.isatty() else None

    @classmethod
    def out(cls) -> Terminal:
        """Returns a terminal on the current standard output."""
        return cls(sys.stdout)

    @classmethod
    def err(cls) -> Terminal:
        """Returns a terminal on the current standard error."""
        return cls(sys.stderr)

    @property
    def has_colour(self) -> bool:
        """Whether styles are visible."""
        console = self._console
        return console is not None and console.color_system is not None and not console.no_color

    def write(self, text: str, style: str = "") -> None:
        """Writes text unchanged, and flushes.

        Raises:
            OSError: the write failed; the error names the stream.
        """
        try:
            if self._console is None:
                self.stream.write(text)
                self.stream.flush()
            else:
                self._console.out(text, style=style or None, highlight=False, end="")
        except OSError as error:
            error.filename = _NAMES.get(getattr(self.stream, "name", ""), "the output")
            raise

    def rewind(self) -> None:
        """Erases the unfinished line; only where `is_live`."""
        if self.is_live:
            self.stream.write("\r\x1b[K")

    def line(self, text: str = "", style: str = "") -> None:
        """Writes a line unchanged."""
        self.write(f"{text}\n", style)

    def paragraph(self, text: str, *, indent: str = "", style: str = "") -> None:
        """Writes text wrapped to the terminal; continuation lines start with `indent`."""
        self.line("\n".join(self.wrap(text, indent=indent)), style)

    def wrap(self, text: str, *, indent: str = "") -> list[str]:
        """Returns the lines of a paragraph: wrapped on a terminal, a single line elsewhere."""
        if self.width is None or len(text) <= self.width:
            return [text]
        return textwrap.wrap(text, max(self.width, 40), subsequent_indent=indent, break_on_hyphens=False)

    def generated(self, text: str, style: str = "") -> None:
        """Writes generated text; control characters are removed on a terminal, and kept elsewhere."""
        self.write(text.translate(_CONTROLS) if self.stream.isatty() else text, style)

    def can_show(self, characters: str) -> bool:
        """Whether the stream's encoding can represent the characters."""
        try:
            characters.encode(self.stream.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return False
        return True
