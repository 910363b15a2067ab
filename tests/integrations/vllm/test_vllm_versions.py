"""Which vLLM is accepted, and the names of vLLM's that are not public: they exist, and the documentation has all of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from pkgutil import resolve_name
from typing import Any

import pytest

from specplug import ConfigurationError
from specplug_vllm import versions
from specplug_vllm.configuration import NATIVE
from support.environment import ROOT
from support.pages import blocks_of


def pretend(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Another version of vLLM, or none, is installed."""
    module: Any = None
    if version is not None:
        module = types.ModuleType("vllm")
        module.__version__ = version
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(versions.metadata, "version", lambda name: {"specplug-vllm": "0.1.0"}[name])


@pytest.mark.unit
@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.1rc1"])
def test_accepted(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    pretend(monkeypatch, version)
    versions.check_vllm()


@pytest.mark.unit
@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.32.0", "0.3", "0.320.0", "dev"])
def test_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    pretend(monkeypatch, version)
    count = len(versions.PRIVATE_NAMES)
    text = f"specplug-vllm 0.1.0 was checked with vLLM 0.32 and 0.33, and this is vLLM {version}: it uses {count} names"
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        versions.check_vllm()


@pytest.mark.unit
def test_none_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    with pytest.raises(ConfigurationError, match=r"^vLLM is not installed: pip install 'specplug-vllm\[vllm\]'"):
        versions.check_vllm()


@pytest.mark.unit
def test_the_documentation_has_the_table() -> None:
    text = (ROOT / "docs/vllm.md").read_text(encoding="utf-8").partition("## Names of vLLM")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    shown = {name.strip().strip("`"): use.strip().replace("`", "") for name, use in rows}
    assert shown == versions.PRIVATE_NAMES
    for version in (versions.TESTED, versions.READ):
        assert version in text


@pytest.mark.unit
def test_the_documentation_shows_the_readmes_plugin_unchanged() -> None:
    shown = next(block.text for block in blocks_of(ROOT / "docs/vllm.md") if block.file == "last_seen.py")
    found = [block.text for block in blocks_of(ROOT / "README.md") if block.language == "python"]
    whole = next(text for text in found if "class LastSeen" in text)
    begin = whole.index("class LastSeen")
    assert whole[begin : whole.index("\n\n\n", begin)] in shown
    assert next(text for text in found if text.startswith("@hookimpl\ndef load_speculator")) in shown


@pytest.mark.slow
def test_the_names_exist() -> None:
    pytest.importorskip("vllm", reason="needs vLLM: see CONTRIBUTING.md")
    from vllm.config import SpeculativeConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from support.vllm_engine import PROMPTS, start

    assert "load_model" in vars(GPUModelRunner)
    assert "load_model" in vars(CPUModelRunner)
    for name in versions.PRIVATE_NAMES:
        if "." in name and not name.startswith("GPUModelRunner"):
            assert resolve_name(f"vllm.{name}") is not None
    fields = {field.name for field in dataclasses.fields(SchedulerOutput)}
    assert {"num_scheduled_tokens", "scheduled_spec_decode_tokens"} <= fields
    own = inspect.signature(SpeculativeConfig).parameters.keys()
    assert {key for _, keys, _ in NATIVE.values() for key in keys} <= own
    with start({"method": "ngram"}) as engine:
        runner = engine.runner
        members = {name.partition(".")[2] for name in versions.PRIVATE_NAMES if name.startswith("GPUModelRunner.")}
        assert [name for name in sorted(members) if not hasattr(runner, name)] == []
        assert len(runner.input_batch.num_computed_tokens_cpu) > 0
        seen: list[tuple[list[str], list[CachedRequestState]]] = []
        propose = runner.drafter.propose

        def look(*arguments: Any, **options: Any) -> Any:
            names = list(runner.input_batch.req_ids)
            seen.append((names, [runner.requests[name] for name in names]))
            return propose(*arguments, **options)

        runner.drafter.propose = look
        engine.greedy(PROMPTS[:2], 8)
    names, requests = seen[0]
    assert len(names) == 2
    assert all(request.num_prompt_tokens > 0 and request.sampling_params.max_tokens == 8 for request in requests)
