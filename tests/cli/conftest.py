"""Fixtures of the command line's tests."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from fake_plugins import install

from specplug.cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from click.testing import Result


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPECPLUG_ALLOW_PLUGINS", "SPECPLUG_DENY_PLUGINS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run() -> Callable[..., Result]:
    """Runs the command in this process."""

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(cli, arguments, input=stdin, prog_name="specplug")

    return invoke


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs fake plugins for this process; see `fake_plugins.install`."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield lambda package, **details: install(tmp_path, package, **details)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def lookup(installed: Callable[..., None]) -> str:
    """A speculator `lookup` that really drafts; returns its speculative config."""
    installed("acme-lookup", methods={"lookup": ""})
    return '{"method": "lookup"}'
