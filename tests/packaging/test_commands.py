"""Every command in a fence of a README or page: run, or checked as its kind can be. Tutorials run in `test_tutorials`."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner

import specplug_eagle
from specplug import AsyncLLM
from support.environment import ROOT
from support.pages import EXAMPLES, MAKERS, PAGES, TUTORIALS, blocks_of, commands_in
from support.serving import live

SMALL = {"org/model": "tiny", "org/head": str(Path(specplug_eagle.__file__).parent / "tiny")}
"""What stands for anybody's checkpoints in `python -m` commands, and `FEWER` for what a training may cost here."""
FEWER = {"specplug_eagle.train": ("--max-steps", "1", "--epochs", "1")}
QUICK = {"check": ("--quick", "--only", "startup", "--only", "validity"), "demo": ("--max-tokens", "16")}
"""What is added to a command: the whole kit runs elsewhere, on every shipped method."""


def commands() -> list[tuple[str, Path, str]]:
    """(name, page, command) of every line in a shell fence; one that several pages have is named by the first."""
    found: dict[str, tuple[str, Path, str]] = {}
    for page in (*PAGES, *EXAMPLES, *MAKERS):
        for block in blocks_of(page) if page not in TUTORIALS else ():
            if block.language == "sh":
                lines = (line.partition("  #")[0].strip() for line in commands_in(block))
                for line in lines:
                    found.setdefault(line, (f"{block.name}: {line}", page, line))
    return list(found.values())


def of_kind(*starts: str) -> Any:
    """Parametrizes with the commands that start with one of these words."""
    chosen = [each for each in commands() if kind_of(each[2]) in starts]
    assert chosen, starts
    return pytest.mark.parametrize(("page", "line"), [pytest.param(*rest, id=name) for name, *rest in chosen])


def kind_of(line: str) -> str:
    words = shlex.split(line)
    if words[0] == "python":
        return "module" if words[1] == "-m" else "script"
    return "shell" if words[0] == "sh" or words[0].endswith(".sh") else words[0]


def test_every_command_is_of_a_kind_that_is_checked() -> None:
    kinds = {kind_of(line) for _, _, line in commands()}
    assert kinds == {"specplug", "module", "script", "shell", "pip", "make", "curl"}


@of_kind("specplug")
def test_specplug(page: Path, line: str) -> None:
    from specplug.cli.main import cli

    arguments = shlex.split(line)[1:]
    if arguments[0] == "serve":
        assert_serves(arguments)
        return
    if len(arguments) < 2 or arguments[1] not in ("--help", "--explain"):
        arguments += QUICK.get(arguments[0], ())
    result = CliRunner().invoke(cli, arguments, prog_name="specplug")
    assert result.exit_code == 0, result.output
    assert result.output.strip()


def assert_serves(arguments: list[str]) -> None:
    """Starts a server on a free port, and ends it."""
    command = [sys.executable, "-m", "specplug", *arguments, "--port", "0", "--memory", "256MiB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = []
        for line in server.stderr:
            lines.append(line)
            if line.startswith("Serving"):
                server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, lines
        assert any(line.startswith("Serving") for line in lines)


@of_kind("curl")
def test_curl(page: Path, line: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    with (
        AsyncLLM("tiny", speculative_config={"method": "ngram"}, memory="256MiB") as engine,
        live(engine) as server,
    ):
        command = shlex.split(line.replace("http://127.0.0.1:8000", server.url))
        done = subprocess.run([curl, "--fail", *command[1:]], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@of_kind("module")
def test_python_module(page: Path, line: str, tmp_path: Path) -> None:
    words = [SMALL.get(word, word) for word in shlex.split(line)[1:]]
    texts = [json.dumps({"text": f"def f{number}(x):\n    return x + {number}\n"}) for number in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    command = [sys.executable, *words, *FEWER.get(words[1], ())]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class ParsedError(Exception):
    """The arguments were read; nothing more is wanted of the script."""


@of_kind("script")
def test_a_scripts_arguments_are_those_that_it_knows(page: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)[1:]
    script = next(folder / words[0] for folder in (ROOT, page.parent) if (folder / words[0]).is_file())
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        parse(parser, *arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(ParsedError):
        runpy.run_path(str(script), run_name="__main__")


@of_kind("shell")
def test_a_shell_script_is_there_and_can_be_read(page: Path, line: str) -> None:
    words = shlex.split(line)
    script = ROOT / next(word for word in words if word.endswith(".sh"))
    assert words[0] == "sh" or os.access(script, os.X_OK)
    first = script.read_text(encoding="utf-8").partition("\n")[0]
    shell = shutil.which("bash" if "bash" in first else "sh")
    assert shell is not None
    assert subprocess.run([shell, "-n", str(script)], check=False).returncode == 0


@of_kind("pip")
def test_what_is_installed_is_a_package_of_this_repository(page: Path, line: str) -> None:
    projects = [
        tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        for pattern in ("core", "plugins/*", "examples/*")
        for path in ROOT.glob(f"{pattern}/pyproject.toml")
    ]
    names = {project["name"] for project in projects}
    names |= {f"{each['name']}[{extra}]" for each in projects for extra in each.get("optional-dependencies", ())}
    words = shlex.split(line)
    assert words[:2] == ["pip", "install"]
    assert names >= set(words[2:])


@of_kind("make")
def test_a_make_target_exists(page: Path, line: str) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(line.split()[1:]) <= set(targets)
