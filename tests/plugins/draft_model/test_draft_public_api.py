"""The plugin stands on core's public names alone, and on what its own distribution requires."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import specplug
import specplug_draft_model

PACKAGE = Path(specplug_draft_model.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
TYPES_ONLY = {"transformers"}


def imports(file: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import, wherever it stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("file", MODULES, ids=[file.stem for file in MODULES])
def test_only_public_names_of_core_are_imported(file: Path) -> None:
    for module, name in imports(file):
        if module.partition(".")[0] == "specplug":
            assert module == "specplug", f"{module} is private to core"
            assert name in specplug.__all__, f"specplug.{name} is not public"


def test_nothing_is_imported_that_the_distribution_does_not_require() -> None:
    used = {module.partition(".")[0] for file in MODULES for module, _ in imports(file)}
    project = Path(__file__).parents[3] / "plugins" / "draft_model" / "pyproject.toml"
    required = {
        name.partition(">")[0] for name in tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    }
    assert used - sys.stdlib_module_names - {"specplug_draft_model"} - TYPES_ONLY == required


def test_no_private_attribute_of_another_object_is_used() -> None:
    """Only `self`, and `cls`, may be asked for a name with an underscore."""
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                assert isinstance(node.value, ast.Name), f"{file.name}:{node.lineno}"
                assert node.value.id in ("self", "cls"), f"{file.name}:{node.lineno}"
