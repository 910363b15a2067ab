"""The shipped methods and the example stand on core's public names alone."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import specplug

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
OF_CORE = {"huggingface_hub", "numpy"}  # come with core's own requirements
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


@pytest.mark.parametrize("package", PACKAGES)
def test_the_distribution_requires_what_it_imports(package: str) -> None:
    used, types_only = set(), {"transformers"}  # its models are handed over by core, which requires it
    for file in sorted((ROOT / package / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, "relative imports hide what is imported"
                used.add(str(node.module).partition(".")[0])
    project = tomllib.loads((ROOT / package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {name.partition(">")[0] for name in project["dependencies"]}
    own = {each.name for each in (ROOT / package / "src").iterdir()}
    assert required <= used
    assert used - sys.stdlib_module_names - own - types_only - OF_CORE <= required


@pytest.mark.parametrize("package", PACKAGES)
def test_no_private_attribute_of_another_object_is_used(package: str) -> None:
    """Only `self` and `cls` may be asked for a name with an underscore; argparse and nn.Module have no other way."""
    for file in sorted((ROOT / package / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert is_own or node.attr in ("_ArgumentGroup", "_modules"), f"{file.name}:{node.lineno}"


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    tree = ast.parse(Path(specplug.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == specplug._HOME_OF
    for name, home in seen.items():
        assert getattr(specplug, name) is getattr(importlib.import_module(str(home)), name)
    assert sorted({*seen, "__version__"}) == sorted(specplug.__all__)


def test_every_error_is_public() -> None:
    errors = importlib.import_module("specplug.errors")
    names = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert "RequestError" in names
    assert names <= set(specplug.__all__)


def test_what_users_get_and_annotate_is_public() -> None:
    for module in ("specplug.outputs", "specplug.stats", "specplug.metrics", "specplug.sampling.logprobs"):
        loaded = importlib.import_module(module)
        own = {name for name, value in vars(loaded).items() if inspect.isclass(value) and value.__module__ == module}
        assert own <= set(specplug.__all__), module
    assert {"Engine", "EngineConfig", "StepOutput", "Request", "StepReport", "RowRandomness"} <= set(specplug.__all__)


def test_the_import_stays_light() -> None:
    """Neither the package nor an error costs an import of torch."""
    code = "import sys; import specplug; specplug.RequestError; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("package", ["core", *PACKAGES])
def test_packages_that_say_they_are_typed_are(package: str) -> None:
    said = "Typing :: Typed" in (ROOT / package / "pyproject.toml").read_text(encoding="utf-8")
    (source,) = [each for each in (ROOT / package / "src").iterdir() if (each / "__init__.py").is_file()]
    assert (source / "py.typed").is_file() == said
