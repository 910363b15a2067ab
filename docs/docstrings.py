"""Docstrings in Google's style, in parts."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import attrs

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$")
_ENTRY = re.compile(r"^(\w+): (.*)$", re.DOTALL)


@attrs.frozen
class Docstring:
    """What a docstring says.

    Attributes:
        text: everything that is in no section, in paragraphs.
        sections: the text of each section, dedented.
    """

    text: str
    sections: dict[str, str]

    @classmethod
    def of(cls, documented: Any) -> Docstring:
        """Takes a docstring apart.

        Raises:
            ValueError: there is none.
        """
        doc = inspect.getdoc(documented)
        if not doc:
            raise ValueError(f"{documented!r} has no docstring")
        parts: dict[str, list[str]] = {"": []}
        current = ""
        for line in doc.splitlines():
            if match := _SECTION.match(line):
                current = match.group(1)
                parts[current] = []
            elif current and line and not line.startswith(" "):
                current = ""
                parts[""].append(line)
            else:
                parts[current].append(line)
        sections = {name: textwrap.dedent("\n".join(lines)).strip("\n") for name, lines in parts.items() if name}
        return cls(re.sub(r"\n{3,}", "\n\n", "\n".join(parts[""])).strip(), sections)

    def entries(self, section: str) -> dict[str, str]:
        """The `name: text` entries of a section, each in one line."""
        found: dict[str, str] = {}
        name = ""
        for line in self.sections.get(section, "").splitlines():
            match = None if line.startswith(" ") else _ENTRY.match(line)
            if match:
                name = match.group(1)
                found[name] = match.group(2).strip()
            else:
                found[name] += " " + line.strip()
        return found

    def paragraph(self, section: str) -> str:
        """A section without entries, in one line."""
        return " ".join(self.sections.get(section, "").split())
