"""Draws docs/images/demo.svg from a real run of `specplug demo` in a terminal of 80 columns.

The run is complete; the picture leaves out what plain decoding and all speculators but one showed, and the last prompt.
Run it again with:

    python docs/make_demo_picture.py --show ngram
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 80
FILE = Path(__file__).parent / "images" / "demo.svg"
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
OMITTED = "\x1b[2m  ...\x1b[0m"


def record_demo() -> list[str]:
    """What a terminal shows of the demo, line by line, colours included.

    Raises:
        SystemExit: the demo fails.
    """
    inside, outside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "specplug.cli.main", "demo"],
        stdin=subprocess.DEVNULL,
        stdout=outside,
        stderr=outside,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "PYTHONUTF8": "1"},
    )
    os.close(outside)
    data = b""
    with contextlib.suppress(OSError):  # a terminal ends with an error
        while piece := os.read(inside, 65536):
            data += piece
    os.close(inside)
    text = data.decode()
    if process.wait():
        raise SystemExit(text)
    # A line that was written anew begins again after the code that emptied it.
    return [line.rpartition("\r\x1b[K")[2] for line in text.replace("\r\n", "\n").rstrip("\n").split("\n")]


def choose_lines(lines: list[str], method: str) -> list[str]:
    """The beginning, one speculator's part, and the result; of the other parts only the headings."""
    parts: list[list[str]] = [["\x1b[1;32m$\x1b[0m \x1b[1mspecplug demo\x1b[0m"]]
    for line in lines:
        if plain(line).startswith("== "):
            parts.append([])
        parts[-1].append(line)
    shown = []
    for part in parts:
        title = plain(part[0])
        if title.startswith(f"== Speculator {method}:"):
            last = max(index for index, line in enumerate(part) if plain(line).startswith("Prompt "))
            shown += [*part[:last], OMITTED, ""]
        elif title.startswith(("== Plain", "== Speculator")):
            shown += [part[0], OMITTED, ""]
        else:
            shown += part
    return shown


def plain(line: str) -> str:
    """A line without its colours."""
    return re.sub(r"\x1b\[[0-9;]*[mK]", "", line)


def draw(lines: list[str]) -> str:
    """The lines as an SVG of a terminal, without fonts from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, overflow="ignore", crop=False)
    template = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = template.replace("Fira Code, monospace", FONTS)
    return console.export_svg(title="specplug demo", theme=MONOKAI, code_format=template, unique_id="demo")


def main() -> None:
    """Runs the demo and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", default="ngram", metavar="METHOD", help="the speculator whose part is shown whole")
    lines = choose_lines(record_demo(), parser.parse_args().show)
    too_wide = [line for line in map(plain, lines) if len(line) > COLUMNS]
    if too_wide:
        raise SystemExit(f"wider than {COLUMNS} columns: {too_wide[0]}")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(draw(lines), encoding="utf-8")
    print(f"{FILE.relative_to(Path(__file__).parent)}: {len(lines)} lines")


if __name__ == "__main__":
    main()
