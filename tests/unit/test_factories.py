"""Every tensor that is made names its dtype and device: the defaults belong to the caller, and to other threads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("core/src", "plugins/*/src", "integrations/*/src", "examples")
FACTORIES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}


def unnamed(source: str) -> Iterator[int]:
    """Lines that make a tensor without saying of which dtype, or where."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
            named = {keyword.arg for keyword in node.keywords}
            is_pinned = any(keyword.arg == "pin_memory" for keyword in node.keywords)  # on the host, then
            if "dtype" not in named or not ("device" in named or is_pinned):
                yield node.lineno


def test_every_factory_names_its_dtype_and_device() -> None:
    files = [file for name in FOLDERS for folder in ROOT.glob(name) for file in folder.rglob("*.py")]
    assert len(files) > 300
    found = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in unnamed(file.read_text("utf-8"))]
    assert found == []


def test_a_factory_without_either_is_seen() -> None:
    source = "torch.zeros(1)\ntorch.zeros(1, dtype=d)\ntorch.ones(1, device=d)\ntorch.rand(1, dtype=d, device=e)\n"
    assert list(unnamed(source)) == [1, 2, 3]
