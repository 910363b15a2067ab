"""Imports point one way: cli → llm → engine → {speculation, plugins, model} → contract."""

from __future__ import annotations

import ast
from pathlib import Path

import specplug

ROOT = Path(specplug.__file__).parent
# Each layer may import itself and what stands before it.
ORDER = [
    "version",
    "errors",
    "values",
    "threads",
    "contract",
    "cache",
    "native",
    "tiny",
    "stats",
    "sampling",
    "model",
    "text",
    "request",
    "config",
    "memory",
    "plugins",
    "speculation",
    "engine",
    "outputs",
    "metrics",
    "progress",
    "llm",
    "testing",
    "bench",
    "scaffold",
    "cli",
    "__main__",
]
# model.checkpoint (headers) is read for generation_config and tokenizers before there is a model.
ALLOWED = {("sampling", "model")}


def runtime_imports(path: Path) -> set[str]:
    """Layers imported at run time; imports for types alone do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("specplug."):
            found.add((node.module or "").split(".")[1])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_imports_point_one_way() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if layer == "__init__":
            continue
        wrong += [
            f"{path.relative_to(ROOT)} imports {imported}"
            for imported in runtime_imports(path)
            if ORDER.index(imported) > ORDER.index(layer) and (layer, imported) not in ALLOWED
        ]
    assert not wrong


def test_core_knows_no_plugin() -> None:
    for path in ROOT.rglob("*.py"):
        assert "specplug_" not in path.read_text(encoding="utf-8").replace("specplug_attention_site", ""), path
