"""Every Python snippet and every specplug command in README and docs runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for number, match in enumerate(FENCE.finditer(page.read_text(encoding="utf-8")), start=1):
            if match.group(1) == language:
                found.append((f"{page.relative_to(ROOT)}#{number}", match.group(2)))
    return found


def snippet_groups() -> list[tuple[str, str]]:
    """Snippets that continue the one before (they import nothing) run together with it."""
    groups: list[tuple[str, str]] = []
    for name, code in blocks("python"):
        same_page = groups and groups[-1][0].partition("#")[0] == name.partition("#")[0]
        if same_page and "import " not in code:
            groups[-1] = (groups[-1][0], groups[-1][1] + "\n" + code)
        else:
            groups.append((name, code))
    return groups


def commands() -> list[tuple[str, str]]:
    found = []
    for name, text in blocks("sh"):
        for line in text.splitlines():
            line = line.partition("  #")[0].strip()
            if line.startswith("specplug "):
                found.append((f"{name}: {line}", line))
    return found


def test_there_is_something_to_run() -> None:
    assert len(snippet_groups()) >= 8
    assert len(commands()) >= 6


@pytest.mark.parametrize(("name", "code"), [pytest.param(*each, id=each[0]) for each in snippet_groups()])
def test_snippet(name: str, code: str) -> None:
    exec(compile(code, name, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize(("name", "line"), [pytest.param(*each, id=each[0]) for each in commands()])
def test_command(name: str, line: str) -> None:
    from specplug.cli.main import cli

    result = CliRunner().invoke(cli, shlex.split(line)[1:], prog_name="specplug")
    assert result.exit_code == 0, result.output
    assert result.output.strip()


def test_every_hook_is_named_in_the_documentation() -> None:
    from specplug.plugins.registry import HOOKS

    text = (ROOT / "core/src/specplug/contract/hookspecs.py").read_text(encoding="utf-8")
    for hook in HOOKS:
        assert f"def {hook}(" in text


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
