"""The shipped methods and the example stand on core's public names alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import specplug

ROOT = Path(__file__).parents[2]
PACKAGES = ["plugins/ngram", "plugins/eagle", "plugins/draft_model", "examples/specplug-suffix"]


@pytest.mark.parametrize("package", PACKAGES)
def test_only_public_names_of_core_are_imported(package: str) -> None:
    files = sorted((ROOT / package / "src").rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                assert not [name for name in names if name.startswith("specplug.")], where
            elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "specplug":
                assert node.module == "specplug", where
                assert {alias.name for alias in node.names} <= set(specplug.__all__), where
