"""Every plugin, installed from its wheel beside core's alone, outside the checkout: listed, used, checked, and gone."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from specplug import resolve_model
from support.environment import ROOT, Environment, build
from support.heads import save_eagle1
from support.pages import blocks_of

PLUGINS: dict[str, dict[str, dict[str, Any]]] = {
    "plugins/ngram": {"ngram": {"prompt_lookup_max": 3, "prompt_lookup_min": 1}},
    "plugins/draft_model": {"draft_model": {"model": "tiny"}},
    "plugins/eagle": {"eagle": {}, "eagle3": {"model": "tiny", "tree_total_tokens": 12}},
    "examples/specplug-suffix": {"suffix": {}},
}
CHECKED = {"ngram": (), "suffix": (), "draft_model": ("--target", "tiny"), "eagle3": ("--target", "tiny")}
"""On which targets. The whole kit runs for each of them in the checkout, and on the wheels of two new packages."""
PROMPT = "x = [0, 1, 0, 1, 0, 1,"
GENERATE = ("generate", "tiny", "--prompt", PROMPT, "--max-tokens", "24", "--temperature", "0")


HOSTED = """
import sys
from array import array
from specplug.host import ArrayTokens, HostLimits, SpeculatorHost

limits = HostLimits(vocab_size=4096, max_model_len=64, max_num_seqs=2)
host = SpeculatorHost({"method": sys.argv[1], "num_speculative_tokens": 3}, limits, strict=True)
row = host.add(ArrayTokens(array("i", [*range(5, 13), *range(5, 10)]), 13))
(draft,) = host.propose([row])
print("drafted:", draft.tokens)
host.end(row)
host.propose([])
host.close()
assert not {"vllm", "ray"} & sys.modules.keys()
"""
IN_A_HOST = dict.fromkeys(("ngram", "suffix"), "drafted: [10, 11, 12]\n")
"""What those draft in an engine of another's; the others read target states, or share block tables."""


@pytest.fixture(scope="module")
def with_core(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("isolated"))
    environment.pip("install", "--quiet", "--no-deps", str(build(ROOT / "core")))
    return environment


def config_of(method: str, keys: dict[str, Any], root: Path) -> str:
    if method == "eagle":  # nobody made an EAGLE-1 head for the embedded target: this one is random, and fits
        target = json.loads((Path(resolve_model("tiny")) / "config.json").read_text(encoding="utf-8"))
        head = save_eagle1(root / "eagle-1-head", vocabulary=target["vocab_size"], hidden=target["hidden_size"])
        keys = {"model": str(head)}
    return json.dumps({"method": method, **keys})


def test_core_alone_says_how_to_get_a_method(with_core: Environment) -> None:
    assert with_core.methods() == set()
    assert "pip install" in with_core.specplug("list").stdout
    for folder, methods in PLUGINS.items():
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for method in methods:
            done = with_core.specplug(*GENERATE, "--speculative-config", json.dumps({"method": method}))
            assert done.returncode == 1
            assert (
                f"no speculator named '{method}'; if a package provides it: pip install {project['name']} ("
                in done.stderr
            )
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize("folder", list(PLUGINS))
def test_a_plugin_alone(with_core: Environment, folder: str) -> None:
    wheel = build(ROOT / folder)
    with_core.pip("install", "--quiet", "--no-deps", str(wheel))
    try:
        assert with_core.methods() == set(PLUGINS[folder])
        listed = with_core.specplug("list", "-v", "--check")
        assert listed.returncode == 0, listed.stdout
        assert str(with_core.site) in listed.stdout
        plain = with_core.specplug(*GENERATE)
        assert plain.stdout.strip()
        for method, keys in PLUGINS[folder].items():
            config = ("--speculative-config", config_of(method, keys, with_core.root))
            fast = with_core.specplug(*GENERATE, "--stats", *config)
            assert fast.returncode == 0, fast.stderr
            assert plain.stdout.strip() in fast.stdout
            if method in IN_A_HOST:
                hosted = with_core.run("python", "-c", HOSTED, method)
                assert (hosted.returncode, hosted.stdout) == (0, IN_A_HOST[method]), hosted.stderr
            if method in CHECKED:
                checked = with_core.specplug("check", method, "--quick", "--only", "greedy", *CHECKED[method], *config)
                assert checked.returncode == 0, checked.stdout + checked.stderr
                assert re.search(r": only 2 of \d+ checks were run; none failed\n$", checked.stdout), checked.stdout
        if folder.startswith("examples"):  # the others' snippets run with the documentation
            for block in blocks_of(ROOT / folder / "README.md"):
                if block.language == "python":
                    assert with_core.run("python", "-c", block.text).returncode == 0, block.name
    finally:
        with_core.pip("uninstall", "--quiet", "--yes", wheel.name.partition("-")[0])
    assert with_core.methods() == set()
