"""Every plugin, installed from its wheel beside core's alone, outside the checkout: listed, used, uninstalled, gone."""

from __future__ import annotations

import json

import pytest

from support.environment import ROOT, Environment, build
from support.pages import blocks_of

PLUGINS = {
    "ngram": ("plugins/ngram", {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}),
    "draft_model": ("plugins/draft_model", {"method": "draft_model", "model": "tiny"}),
    "eagle3": ("plugins/eagle", {"method": "eagle3", "model": "tiny", "tree_total_tokens": 12}),
    "suffix": ("examples/specplug-suffix", {"method": "suffix", "suffix_decoding_max_spec_factor": 2.0}),
}
PROMPT = "x = [0, 1, 0, 1, 0, 1,"


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
        if folder.startswith("examples"):  # the others' snippets run with the documentation
            for block in blocks_of(ROOT / folder / "README.md"):
                if block.language == "python":
                    assert with_core.run("python", "-c", block.text).returncode == 0, block.name
    finally:
        with_core.pip("uninstall", "--quiet", "--yes", wheel.name.partition("-")[0])
    assert with_core.methods() == set()
