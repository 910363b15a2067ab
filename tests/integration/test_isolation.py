"""Every plugin, installed from its wheel beside core's alone, outside the checkout: listed, used, uninstalled, gone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGINS = {
    "ngram": ("plugins/ngram", {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}),
    "draft_model": ("plugins/draft_model", {"method": "draft_model", "model": "tiny"}),
    "eagle3": ("plugins/eagle", {"method": "eagle3", "model": "tiny", "tree_total_tokens": 12}),
    "suffix": ("examples/specplug-suffix", {"method": "suffix", "suffix_decoding_max_spec_factor": 2.0}),
}
PROMPT = "x = [0, 1, 0, 1, 0, 1,"


class Environment:
    """A fresh virtual environment. Third-party packages are shared with the tests' own; nothing of specplug is."""

    def __init__(self, root: Path) -> None:
        shared = root / "shared"
        shared.mkdir(parents=True)
        for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
            if "specplug" not in entry.name.lower() and entry.suffix != ".pth":
                (shared / entry.name).symlink_to(entry)
        venv.create(root / "env", with_pip=False)
        self.root = root
        self.site = next((root / "env").glob("lib/python*/site-packages"))
        (self.site / "shared.pth").write_text(str(shared), encoding="utf-8")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPECPLUG_", "PYTHON"))}
        self.environment = kept | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PIP_NO_INDEX": "1",
            "PYTHONUTF8": "1",
        }

    def pip(self, *arguments: str) -> None:
        """Runs the tests' pip on this environment."""
        command = [sys.executable, "-m", "pip", "--python", str(self.root / "env/bin/python"), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr

    def specplug(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the installed command, outside the checkout."""
        return subprocess.run(
            [str(self.root / "env/bin/specplug"), *arguments],
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def methods(self) -> set[str]:
        """The methods that `specplug list` shows as usable."""
        shown = json.loads(self.specplug("list", "--json").stdout)
        return {plugin["method"] for plugin in shown if plugin["status"] == "ok"}


def build(project: Path, root: Path) -> Path:
    """Builds a wheel from a copy of the sources."""
    copy = root / "src" / project.name
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "tests"))
    wheels = root / "wheels" / project.name
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(wheels), str(copy)], check=True, timeout=180)
    return next(wheels.glob("*.whl"))


@pytest.fixture(scope="module")
def with_core(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("isolated"))
    environment.pip("install", "--quiet", "--no-deps", str(build(ROOT / "core", environment.root)))
    return environment


def test_core_alone_says_how_to_get_a_method(with_core: Environment) -> None:
    assert with_core.methods() == set()
    assert "pip install" in with_core.specplug("list").stdout
    for method in PLUGINS:
        config = json.dumps({"method": method})
        done = with_core.specplug("generate", "tiny", "--prompt", PROMPT, "--speculative-config", config)
        assert done.returncode == 1
        assert f"'{method}'" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", list(PLUGINS))
def test_a_plugin_alone(with_core: Environment, method: str) -> None:
    folder, config = PLUGINS[method]
    wheel = build(ROOT / folder, with_core.root)
    with_core.pip("install", "--quiet", "--no-deps", str(wheel))
    try:
        assert method in with_core.methods()
        listed = with_core.specplug("list", "-v", "--check")
        assert listed.returncode == 0, listed.stdout
        assert str(with_core.site) in listed.stdout
        checked = with_core.specplug(
            "check", method, "--quick", "--only", "startup", "--only", "greedy", "--speculative-config", json.dumps(config),
            "--target", "tiny",
        )  # fmt: skip
        assert checked.returncode == 0, checked.stdout + checked.stderr
        plain = with_core.specplug("generate", "tiny", "--prompt", PROMPT, "--max-tokens", "24", "--temperature", "0")
        fast = with_core.specplug(
            "generate", "tiny", "--prompt", PROMPT, "--max-tokens", "24", "--temperature", "0", "--stats",
            "--speculative-config", json.dumps(config),
        )  # fmt: skip
        assert fast.returncode == 0, fast.stderr
        assert plain.stdout.strip()
        assert plain.stdout.strip() in fast.stdout
    finally:
        with_core.pip("uninstall", "--quiet", "--yes", wheel.name.partition("-")[0])
    assert with_core.methods() == set()
