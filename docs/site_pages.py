"""What the site needs beyond docs/: the READMEs of the methods as pages, and links between files as links between pages.

Used by mkdocs.yml. On a code host the same Markdown is read as it lies.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
METHODS = {
    "ngram": "plugins/ngram/README.md",
    "draft_model": "plugins/draft_model/README.md",
    "eagle": "plugins/eagle/README.md",
    "suffix": "examples/specplug-suffix/README.md",
}
FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the READMEs."""
    for method, readme in METHODS.items():
        text = (ROOT / readme).read_text(encoding="utf-8")
        files.append(File.generated(config, f"methods/{method}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Rewrites links between files of the repository; a link to a file that is no page becomes its text."""
    del config, files
    here = page.file.src_uri
    source = next((METHODS[m] for m in METHODS if here == f"methods/{m}.md"), f"docs/{here}")

    def rewrite(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        if not target or "://" in target:
            return match.group(0)
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        site = _page_of(place)
        if site is None:
            return text
        return f"{image}[{text}]({posixpath.relpath(site, posixpath.dirname(here) or '.')}{anchor or ''})"

    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewrite, part) for part in parts)


def _page_of(place: str) -> str | None:
    """The page or file of the site for a file of the repository, if there is one."""
    for method, readme in METHODS.items():
        if place == readme:
            return f"methods/{method}.md"
    return place.removeprefix("docs/") if place.startswith("docs/") else None
