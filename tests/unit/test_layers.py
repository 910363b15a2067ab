"""Imports point one way: cli → llm → engine → {speculation, plugins, model} → contract."""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import TopologicalSorter
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
    "cache_folder",
    "native",
    "tiny",
    "stats",
    "trace",
    "sampling",
    "model",
    "lora",
    "text",
    "request",
    "config",
    "plugins",
    "speculation",
    "host",
    "engine",
    "outputs",
    "metrics",
    "progress",
    "frontend",
    "streams",
    "llm",
    "async_llm",
    "server",
    "testing",
    "bench",
    "scaffold",
    "cli",
    "__main__",
]
# model.checkpoint (headers) is read for generation_config and tokenizers before there is a model.
ALLOWED = {("sampling", "model")}
SHIPPED_METHODS = {"ngram", "draft_model", "eagle", "eagle3", "suffix"}


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


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Modules of core that a module imports anywhere, also within functions and for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found & modules) - {ROOT.name}


def test_no_import_circle() -> None:
    """Also none through imports for types alone: two modules that name each other are one noun, or lack a third."""
    paths = {module_name(path): path for path in ROOT.rglob("*.py")}
    graph = {name: imported_modules(path, set(paths)) - {name} for name, path in paths.items()}
    for name in graph:  # the contract names, for type checkers alone, the classes that plugins are given
        if name.startswith("specplug.contract"):
            graph[name] = {other for other in graph[name] if other.startswith("specplug.contract")}
    known = set(paths) - {ROOT.name}
    TopologicalSorter({name: graph[name] & known for name in known}).prepare()  # raises CycleError, which names them


def test_folders_are_small() -> None:
    """At most 16 modules side by side: more have a room of their own."""
    folders = {path.parent for path in ROOT.rglob("*.py")}
    sizes = {
        folder.relative_to(ROOT).as_posix(): len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        for folder in folders
    }
    assert not {name: size for name, size in sizes.items() if size > 16}


def test_core_knows_no_plugin() -> None:
    """Core's code names neither a plugin's module nor a method of a plugin that is shipped with it.

    Docstrings, help texts and messages may show a method as an example: only strings that are exactly a method's name,
    which code could compare with or look up, are refused.
    """
    found = []
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "specplug_" not in text.replace("specplug_attention_site", ""), path
        found += [
            f"{path.relative_to(ROOT)}:{node.lineno} names {node.value}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in SHIPPED_METHODS
        ]
    assert not found


def test_test_modules_have_names_of_their_own() -> None:
    """pytest cannot hold two modules of one name, and finds that out only where both folders are run."""
    names = Counter(path.name for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
