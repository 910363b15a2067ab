"""The tutorials, read from top to bottom in a fresh environment: every command and snippet is run as it is written."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from support.environment import ROOT, Environment, build
from support.pages import TUTORIALS, Block, blocks_of, commands_in

FAILS = "  # exit status 1"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Nothing of specplug is installed; `pip install` finds wheels of it, and of nothing else."""
    environment = Environment(tmp_path_factory.mktemp("tutorial"))
    wheels = environment.root / "found"
    wheels.mkdir()
    for project in ("core", "plugins/ngram", "plugins/draft_model"):
        shutil.copy(build(ROOT / project), wheels)
    binaries = environment.root / "env/bin"
    pip = binaries / "pip"
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {binaries}/python "$@"\n', encoding="utf-8")
    pip.chmod(0o755)
    pytest_command = binaries / "pytest"
    pytest_command.write_text(f'#!/bin/sh\nexec {binaries}/python -m pytest -p no:xdist "$@"\n', encoding="utf-8")
    pytest_command.chmod(0o755)
    environment.environment |= {
        "PATH": f"{binaries}{os.pathsep}{environment.environment['PATH']}",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_QUIET": "1",
    }
    return environment


def script_of(page: Path) -> str:
    """A page as one shell script."""
    lines = ["set -ex"]
    for block in blocks_of(page):
        if block.language == "sh":
            lines += [shell(line) for line in commands_in(block)]
        elif block.language == "python":
            lines.append(heredoc(f"cat > {block.file}" if block.file else "python -", block))
    return "\n".join(lines)


def shell(line: str) -> str:
    """A command; one that is said to fail must fail so."""
    command = shorter(line.removesuffix(FAILS))
    return f'{command} && exit 90 || [ "$?" = 1 ]' if line.endswith(FAILS) else command


def shorter(command: str) -> str:
    """The same with less to do: the whole kit, as a new package's tests, is what `test_new` is for."""
    return "pytest -k 'startup or budgets'" if command == "pytest" else command


def heredoc(command: str, block: Block) -> str:
    return f"{command} <<'END OF BLOCK'\n{block.text}END OF BLOCK"


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.name)
def test_tutorial(fresh: Environment, page: Path) -> None:
    if page != TUTORIALS[0]:
        fresh.pip("install", "specplug", "specplug-ngram", "specplug-draft-model")
    work = fresh.root / page.stem
    work.mkdir()
    script = work / "page.sh"
    script.write_text(f"cd {work}\n{script_of(page)}\n", encoding="utf-8")
    shell_path = shutil.which("bash") or "/bin/sh"
    done = fresh.run_path(shell_path, str(script))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if page.stem == "write-a-speculator":
        assert "recall (specplug-recall 0.1.0): conformant" in done.stdout
        assert "not conformant: budgets" in done.stdout
        assert "expected: at most row.budget.max_nodes nodes" in done.stdout
        assert "did you mean 'window'?" in done.stdout
