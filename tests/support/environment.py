"""A fresh virtual environment outside the checkout, and wheels to install there."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

from support.commands import CommandServer

ROOT = Path(__file__).parents[2]


class Environment:
    """A fresh virtual environment. Third-party packages are shared with the tests' own; nothing of specplug is."""

    def __init__(self, root: Path) -> None:
        # One folder for each: the parts of a namespace package may be in both.
        folders = dict.fromkeys((Path(sysconfig.get_paths()["purelib"]), _home_of("torch")))
        shared = [root / f"shared-{number}" for number, _ in enumerate(folders)]
        for links, folder in zip(shared, folders, strict=True):
            links.mkdir(parents=True)
            for entry in folder.iterdir():
                if "specplug" not in entry.name.lower() and entry.suffix != ".pth":
                    (links / entry.name).symlink_to(entry)
        venv.create(root / "env", with_pip=False)
        self.root = root
        self.site = next((root / "env").glob("lib/python*/site-packages"))
        (self.site / "shared.pth").write_text("\n".join(map(str, shared)), encoding="utf-8")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPECPLUG_", "PYTHON"))}
        self.environment = kept | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PIP_NO_INDEX": "1",
            "PYTHONUTF8": "1",
        }
        self._server: CommandServer | None = None

    def pip(self, *arguments: str) -> None:
        """Runs the tests' pip on this environment."""
        command = [sys.executable, "-m", "pip", "--python", str(self.root / "env/bin/python"), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr

    def run(self, command: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment, outside the checkout."""
        return self.run_path(str(self.root / "env/bin" / command), *arguments, **variables)

    def run_path(self, path: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs any program with the environment's variables, outside the checkout."""
        return subprocess.run(
            [path, *arguments],
            env=self.environment | variables,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def specplug(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs the installed command; those that need PyTorch in a process where it is imported already."""
        if arguments[0] not in ("generate", "check"):
            return self.run("specplug", *arguments, **variables)
        if self._server is None:
            self._server = CommandServer(str(self.root / "env/bin/python"), self.environment)
            atexit.register(self._server.close)
        return self._server.run(*arguments, environment=self.environment | variables, cwd=self.root)

    def listed(self, *arguments: str, **variables: str) -> list[dict[str, Any]]:
        """What `specplug list --json` shows."""
        shown: list[dict[str, Any]] = json.loads(self.specplug("list", "--json", *arguments, **variables).stdout)
        return shown

    def methods(self, *arguments: str, **variables: str) -> set[str]:
        """The methods that `specplug list` shows as usable."""
        return {plugin["method"] for plugin in self.listed(*arguments, **variables) if plugin["status"] == "ok"}


def _home_of(module: str) -> Path:
    """The folder that a package is in; it may be another environment's, which this one reads too."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


@functools.cache
def build(project: Path) -> Path:
    """Builds a wheel from a copy of the sources, once in a process."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    copy = root / "src" / project.name
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "tests"))
    return build_wheels(root / "wheels", copy)[0]


def build_wheels(folder: Path, *projects: Path) -> list[Path]:
    """Builds wheels of projects into a folder."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), *map(str, projects)], check=True, timeout=180)
    return sorted(folder.glob("*.whl"))
