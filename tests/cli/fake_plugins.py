"""Plugins in a folder, with the metadata of an installed package, for tests that put the folder on the path."""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
from pathlib import Path

from support.commands import CommandServer

LOOKUP = """
from specplug import Proposal, SpeculatorTraits, hookimpl

class Lookup:
    traits = SpeculatorTraits(token_only=True)

    @hookimpl
    def propose(self, batch):
        return Proposal([self.draft(list(row.tokens), row.budget.max_nodes) for row in batch.rows])

    def draft(self, tokens, limit):
        for start in range(len(tokens) - 3, -1, -1):
            if tokens[start : start + 2] == tokens[-2:]:
                return tokens[start + 2 : start + 2 + limit]
        return []

@hookimpl
def load_speculator(config, target):
    config.get("window")
    return Lookup()
"""


def install(
    folder: Path,
    package: str,
    *,
    methods: dict[str, str],
    source: str = LOOKUP,
    version: str = "1.2",
    requires: str = "specplug>=0.1,<0.2",
    summary: str = "",
    group: str = "specplug",
) -> Path:
    """Writes a package: one module of its name with `source`, and a dist-info folder.

    Args:
        folder: where to; put it on the path.
        package: the distribution's name; the module's name follows from it.
        methods: entry points by name; an empty value names the package's own module.
        source: of the module.
        version: of the distribution.
        requires: its requirement on core; empty for none.
        summary: its one-line description.
        group: of its entry points.
    """
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    requirement = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        f"Summary: {summary or f'The speculator {package}.'}\n{requirement}",
        encoding="utf-8",
    )
    lines = [f"{name} = {value or module}" for name, value in methods.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]), encoding="utf-8")
    return folder


def specplug(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own; `check`, which needs PyTorch, in one where it is imported already."""
    full = {name: value for name, value in os.environ.items() if not name.startswith(("SPECPLUG_", "FORCE_COLOR"))}
    if path is not None:
        full["PYTHONPATH"] = str(path)
    full |= {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"} | environment
    if arguments[0] == "check":
        return _server().run(*arguments, environment=full, cwd=Path.cwd())
    return subprocess.run(
        [sys.executable, "-m", "specplug.cli.main", *arguments],
        capture_output=True,
        encoding="utf-8",
        env=full,
        timeout=120,
        check=False,
    )


@functools.cache
def _server() -> CommandServer:
    server = CommandServer(sys.executable, os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"})
    atexit.register(server.close)
    return server
