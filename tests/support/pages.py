"""The pages of the documentation, and what is fenced in them."""

from __future__ import annotations

import re
from pathlib import Path

import attrs

from support.environment import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
TUTORIALS = [ROOT / "docs" / name for name in ("quickstart.md", "write-a-speculator.md")]
PAGES = [ROOT / "README.md", ROOT / "core/README.md", *DOCS, *sorted(ROOT.glob("plugins/*/README.md"))]
EXAMPLES = sorted(ROOT.glob("examples/*/README.md"))
MAKERS = sorted([*ROOT.glob("core/*/README.md"), *ROOT.glob("plugins/*/*/README.md")])
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\S+\.(?:py|toml))\n")


@attrs.frozen
class Block:
    """What is between two fences.

    Attributes:
        page: where it is.
        number: of the fence, from 1.
        language: behind the opening fence.
        text: what is in it.
    """

    page: Path
    number: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Page and number."""
        return f"{self.page.relative_to(ROOT)}#{self.number}"

    @property
    def file(self) -> str | None:
        """The file that it is the content of, if its first line says so."""
        match = _FILE.match(self.text)
        return match.group(1) if match else None


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = enumerate(_FENCE.finditer(text), start=1)
    return [Block(page, number, match.group(1), match.group(2)) for number, match in found]


def commands_in(block: Block) -> list[str]:
    """The lines of a block, joined where they end with a backslash."""
    return [line for line in block.text.replace("\\\n", "").splitlines() if line.strip()]
