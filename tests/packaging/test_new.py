"""`specplug new`: what it writes builds, installs beside core alone, is listed, and passes its own tests untouched."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from cli.fake_plugins import specplug

ROOT = Path(__file__).parents[2]


def offline() -> dict[str, str]:
    """The environment without anything of this checkout or of the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPECPLUG_", "PYTHON"))}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PIP_NO_INDEX": "1"}


def third_party(folder: Path) -> Path:
    """A folder of links to the installed packages, core and the plugins left out."""
    folder.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "specplug" not in entry.name.lower() and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with core's wheel and two new packages; third-party packages are shared."""
    root = tmp_path_factory.mktemp("fresh")
    environment, wheels = root / "env", root / "wheels"
    venv.create(environment, with_pip=False)
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text(str(third_party(root / "shared")), encoding="utf-8")
    for name, kind in (("my-lookup", "token"), ("My_Draft", "model")):
        result = specplug("new", name, "--kind", kind, "--out", str(root / "src"))
        assert result.returncode == 0, result.stderr
    core = root / "core"
    core.mkdir()
    for each in (ROOT / "core").iterdir():
        if each.name in ("pyproject.toml", "README.md", "LICENSE", "src"):
            (core / each.name).symlink_to(each)
    for project in (core, *sorted((root / "src").iterdir())):
        wheels.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "--wheel-dir", str(wheels), str(project)], check=True, timeout=120, env=offline())
    installed = [sys.executable, "-m", "pip", "--python", str(environment), "install", "--quiet", "--no-deps"]
    subprocess.run([*installed, *map(str, wheels.glob("*.whl"))], check=True, timeout=120, env=offline())
    return root


def run(fresh: Path, *command: str, cwd: Path) -> str:
    """Runs a command of the fresh environment; returns what it printed."""
    executable = fresh / "env" / "bin" / command[0]
    result = subprocess.run(
        [str(executable), *command[1:]],
        cwd=cwd,
        env=offline(),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_new_packages_are_listed_and_loadable(fresh: Path, tmp_path: Path) -> None:
    listed = run(fresh, "specplug", "list", "--check", cwd=tmp_path)
    assert [line.split()[:4] for line in listed.splitlines()[1:] if not line.startswith(" ")] == [
        ["my_draft", "specplug-my-draft", "0.1.0", "ok"],
        ["my_lookup", "specplug-my-lookup", "0.1.0", "ok"],
    ]


@pytest.mark.parametrize("name", ["specplug-my-lookup", "specplug-my-draft"])
def test_a_new_package_passes_its_own_tests(fresh: Path, name: str, tmp_path: Path) -> None:
    quick = tmp_path / "tests"
    quick.mkdir()
    for file in (fresh / "src" / name / "tests").iterdir():
        text = file.read_text(encoding="utf-8")
        shorter = "(SpeculatorConformance):\n    quick = True\n    architectures = ('llama',)\n"
        text = text.replace("(SpeculatorConformance):\n", shorter)
        quick.joinpath(file.name).write_text(text, encoding="utf-8")
    printed = run(
        fresh, "python", "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(quick), cwd=tmp_path
    )
    assert "22 passed" in printed


def test_a_new_package_is_checked_by_the_command(fresh: Path, tmp_path: Path) -> None:
    printed = run(fresh, "specplug", "check", "my_lookup", "--quick", "--only", "tokens", cwd=tmp_path)
    assert printed.splitlines()[-1] == "my_lookup (specplug-my-lookup 0.1.0): only 2 of 23 checks were run; none failed"


def test_a_new_model_package_passes_the_whole_kit_on_its_command(fresh: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from specplug.testing import save_tiny_model, tiny_draft\n"
        "target = Path(sys.argv[1]); save_tiny_model(target, 'llama'); print(tiny_draft(target))"
    )
    target = tmp_path / "target"
    draft = run(fresh, "python", "-c", script, str(target), cwd=tmp_path).strip()
    config = json.dumps({"model": draft})
    printed = run(
        fresh, "specplug", "check", "my_draft", "--quick", "--target", str(target), "--speculative-config", config,
        cwd=tmp_path,
    )  # fmt: skip
    assert printed.splitlines()[-1] == "my_draft (specplug-my-draft 0.1.0): conformant", printed


def test_what_a_new_model_packages_readme_says_can_be_run(fresh: Path, tmp_path: Path) -> None:
    text = (fresh / "src/specplug-my-draft/README.md").read_text(encoding="utf-8")
    snippet = text.partition("```python\n")[2].partition("```")[0]
    run(fresh, "python", "-c", snippet, cwd=tmp_path)
    command = next(line for line in text.splitlines() if line.startswith("specplug check "))
    run(fresh, *shlex.split(command), "--quick", "--only", "startup", cwd=tmp_path)


def test_the_token_package_is_small(fresh: Path) -> None:
    folder = fresh / "src" / "specplug-my-lookup"
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
