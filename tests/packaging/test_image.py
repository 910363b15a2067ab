"""The Dockerfile, carried out without a container: its steps in order, each stage in a folder and an environment of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import attrs
import pytest

from support.environment import ROOT, Environment

DOCKERFILE = ROOT / "examples" / "serving" / "Dockerfile"
KNOWN = {
    "FROM", "WORKDIR", "COPY", "RUN", "ARG", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT",
}  # fmt: skip
SYSTEM = ("apt-get", "useradd")
"""Commands of the image's Debian, which this machine's must not carry out."""


def instructions() -> list[tuple[str, str]]:
    """(word, arguments) of every instruction, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def is_ignored(path: str) -> bool:
    """Whether a path of the context is left out by the ignore file; the last pattern that matches decides."""
    ignored = False
    for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            parts = path.split("/") if line.startswith("**/") else [path.split("/")[0]]
            if any(fnmatch(part, pattern) for part in parts):
                ignored = not line.startswith("!")
    return ignored


@attrs.define
class Stage:
    """One `FROM`: a folder that stands for `/`, and an environment that stands for the image's Python."""

    root: Path
    environment: Environment
    folder: str = "/"
    variables: dict[str, str] = attrs.field(factory=dict)

    def path(self, name: str) -> Path:
        return self.root / os.path.join(self.folder, name).lstrip("/")

    def copy(self, arguments: str, stages: dict[str, Stage]) -> None:
        *sources, target = shlex.split(arguments)
        given = [source for source in sources if source.startswith("--from=")]
        for source in sources[len(given) :]:
            if given:
                shutil.copytree(stages[given[0].removeprefix("--from=")].path(source), self.path(target))
                continue
            assert (ROOT / source).is_dir(), source

            def left_out(folder: str, names: list[str]) -> list[str]:
                return [name for name in names if is_ignored(str((Path(folder) / name).relative_to(ROOT)))]

            shutil.copytree(ROOT / source, self.path(target), ignore=left_out)

    def command(self, line: str) -> str:
        """A shell line with this stage's folders for the image's, without the commands of its Debian."""
        parts = [part.strip() for part in line.split("&&")]
        kept = [part for part in parts if part.split()[0] not in (*SYSTEM, "chown")]
        return re.sub(r"(?<![\w.}/])/(?=(wheels|source|home|var)\b)", f"{self.root}/", " && ".join(kept) or "true")

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        self.path(".").mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            ["/bin/sh", "-ec", self.command(line)],
            cwd=self.path("."),
            env=self.system(),
            text=True,
            capture_output=True,
            timeout=240,
            check=False,
        )

    def system(self) -> dict[str, str]:
        programs = self.root / "programs"
        if not programs.exists():
            programs.mkdir()
            python = self.environment.root / "env/bin/python"
            pip = programs / "pip"
            pip.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip --python "{python}" "$@"\n')
            pip.chmod(0o755)
        path = os.pathsep.join([str(programs), str(self.environment.root / "env/bin"), os.environ["PATH"]])
        return self.environment.environment | self.variables | {"PATH": path, "PIP_NO_BUILD_ISOLATION": "0"}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The last stage, after all its steps."""
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for number, (word, rest) in enumerate(instructions()):
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            assert re.fullmatch(r"python:3\.1[1-9]-slim", image), image
            folder = tmp_path_factory.mktemp("stage")
            stage = stages[name or str(number)] = Stage(folder / "root", Environment(folder))
            stage.root.mkdir()
            continue
        assert stage is not None
        if word == "WORKDIR":
            stage.folder = rest
            stage.path(".").mkdir(parents=True, exist_ok=True)
        elif word == "ARG":
            name, _, value = rest.partition("=")
            stage.variables[name] = value
        elif word == "COPY":
            stage.copy(rest, stages)
        elif word == "RUN":
            done = stage.run(rest)
            assert done.returncode == 0, (rest, done.stdout, done.stderr)
    assert stage is not None
    return stage


def last(word: str) -> str:
    (found,) = [rest for each, rest in instructions() if each == word]
    return found


@pytest.mark.unit
def test_every_instruction_is_known() -> None:
    assert {word for word, _ in instructions()} == KNOWN
    names = [rest.partition(" AS ")[2] for word, rest in instructions() if word == "FROM"]
    copied = [re.findall("--from=(\\w+)", rest) for word, rest in instructions() if word == "COPY"]
    assert {name for each in copied for name in each} <= set(names)
    assert [is_ignored(path) for path in ("core/src/specplug/llm.py", "plugins/eagle/pyproject.toml")] == [False] * 2
    assert all(map(is_ignored, (".git", ".venv/lib", "build", "tests", "core/src/specplug/__pycache__")))


def test_the_wheels_are_those_of_core_and_its_plugins(image: Stage) -> None:
    installed = image.run("specplug list --json")
    assert installed.returncode == 0, installed.stderr
    assert {each["method"] for each in json.loads(installed.stdout)} == {"ngram", "draft_model", "eagle", "eagle3"}
    assert not image.path("/wheels").exists()


@pytest.fixture
def server(image: Stage) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """What the entry point starts, with a port of its own."""
    words = [*json.loads(last("ENTRYPOINT")), "tiny", "--host", "127.0.0.1", "--port", "0", "--memory", "256MiB"]
    server = subprocess.Popen(
        words,
        env=image.system(),
        executable=shutil.which(words[0], path=image.system()["PATH"]),
        cwd=image.path("."),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if line.startswith("Serving"))
        yield server, int(line.split(";")[0].rsplit(":", 1)[1])
    finally:
        server.kill()
        server.wait(60)


def test_the_entry_point_serves_and_the_health_check_sees_it(
    image: Stage, server: tuple[subprocess.Popen[str], int]
) -> None:
    process, port = server
    check = json.loads(last("HEALTHCHECK").partition("CMD")[2])
    assert f":{last('EXPOSE')}/" in check[-1]

    def health(port: int) -> int:
        command = [*check[:-1], check[-1].replace(f":{last('EXPOSE')}/", f":{port}/")]
        return subprocess.run(command, env=image.system(), capture_output=True, timeout=60, check=False).returncode

    assert health(port) == 0
    process.send_signal(getattr(signal, last("STOPSIGNAL")))
    assert process.wait(60) == 0
    assert health(port) != 0
