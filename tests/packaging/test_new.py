"""`specplug new`: what it writes builds, installs beside core alone, is listed, and passes its own tests untouched."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from cli.fake_plugins import specplug
from support.environment import ROOT, Environment, build, build_wheels


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A fresh environment with core's wheel and two new packages."""
    environment = Environment(tmp_path_factory.mktemp("fresh"))
    sources = environment.root / "src"
    for name, kind in (("my-lookup", "token"), ("My_Draft", "model")):
        result = specplug("new", name, "--kind", kind, "--out", str(sources))
        assert result.returncode == 0, result.stderr
    wheels = [build(ROOT / "core"), *build_wheels(environment.root / "wheels", *sorted(sources.iterdir()))]
    environment.pip("install", "--quiet", "--no-deps", *map(str, wheels))
    return environment


def printed_by(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_new_packages_are_listed_and_loadable(fresh: Environment) -> None:
    listed = printed_by(fresh.specplug("list", "--check"))
    assert [line.split()[:4] for line in listed.splitlines()[1:] if not line.startswith(" ")] == [
        ["my_draft", "specplug-my-draft", "0.1.0", "ok"],
        ["my_lookup", "specplug-my-lookup", "0.1.0", "ok"],
    ]


@pytest.mark.parametrize("name", ["specplug-my-lookup", "specplug-my-draft"])
def test_a_new_package_passes_its_own_tests(fresh: Environment, name: str, tmp_path: Path) -> None:
    quick = tmp_path / "tests"
    quick.mkdir()
    for file in (fresh.root / "src" / name / "tests").iterdir():
        text = file.read_text(encoding="utf-8")
        shorter = "(SpeculatorConformance):\n    quick = True\n    architectures = ('llama',)\n"
        text = text.replace("(SpeculatorConformance):\n", shorter)
        quick.joinpath(file.name).write_text(text, encoding="utf-8")
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider")
    printed = printed_by(fresh.run("python", "-m", "pytest", *options, str(quick)))
    assert "24 passed" in printed


def test_a_new_package_is_checked_by_the_command(fresh: Environment) -> None:
    printed = printed_by(fresh.specplug("check", "my_lookup", "--quick", "--only", "tokens"))
    assert printed.splitlines()[-1] == "my_lookup (specplug-my-lookup 0.1.0): only 2 of 24 checks were run; none failed"


def test_a_new_model_package_is_checked_by_the_command(fresh: Environment, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from specplug.testing import save_tiny_model, tiny_draft\n"
        "target = Path(sys.argv[1]); save_tiny_model(target, 'llama'); print(tiny_draft(target))"
    )
    target = tmp_path / "target"
    draft = printed_by(fresh.run("python", "-c", script, str(target))).strip()
    config = json.dumps({"model": draft})
    options = ("--quick", "--only", "greedy", "--target", str(target), "--speculative-config", config)
    printed = printed_by(fresh.specplug("check", "my_draft", *options))
    last = printed.splitlines()[-1]
    assert re.fullmatch(r"my_draft \(specplug-my-draft 0\.1\.0\): only 2 of \d+ checks were run; none failed", last), (
        printed
    )


def test_what_a_new_model_packages_readme_says_can_be_run(fresh: Environment) -> None:
    text = (fresh.root / "src/specplug-my-draft/README.md").read_text(encoding="utf-8")
    snippet = text.partition("```python\n")[2].partition("```")[0]
    printed_by(fresh.run("python", "-c", snippet))
    command = next(line for line in text.splitlines() if line.startswith("specplug check "))
    printed_by(fresh.specplug(*shlex.split(command)[1:], "--quick", "--only", "startup"))


def test_the_token_package_is_small(fresh: Environment) -> None:
    folder = fresh.root / "src" / "specplug-my-lookup"
    assert len((folder / "specplug_my_lookup.py").read_text(encoding="utf-8").splitlines()) <= 25
    assert len((folder / "pyproject.toml").read_text(encoding="utf-8").splitlines()) <= 15


@pytest.mark.parametrize("name", ["", "9lives", "a b", "ä", "class", "-x", "x-", "x" * 41, "a/b", "../x"])
def test_names_that_cannot_be_are_refused(name: str, tmp_path: Path) -> None:
    result = specplug("new", "--out", str(tmp_path), "--", name)
    assert result.returncode == 1
    assert result.stderr.startswith(f"specplug: error: name {name!r}")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ngram", "the installed package specplug-ngram provides the method 'ngram': choose another name"),
        ("Eagle3", "the installed package specplug-eagle provides the method 'eagle3': choose another name"),
    ],
)
def test_what_is_installed_is_no_name_for_a_new_one(name: str, text: str, tmp_path: Path) -> None:
    result = specplug("new", name, "--out", str(tmp_path))
    assert result.returncode == 1
    assert text in result.stderr
    assert not any(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "specplug-mine").mkdir()
    result = specplug("new", "mine", "--out", str(tmp_path))
    assert result.returncode == 1
    assert "already exists: choose another name" in result.stderr
    assert not any((tmp_path / "specplug-mine").iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = specplug("new", "mine", "--out", str(tmp_path / "file"))
    assert result.returncode != 0
    assert "specplug: error:" in result.stderr
