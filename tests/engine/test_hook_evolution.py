"""Hooks may get arguments later: a plugin of today's signatures, or of shorter ones, works unchanged beside a newer one."""

from __future__ import annotations

from typing import Any

import pytest

from specplug import LLM, Proposal, SamplingParams, hookimpl
from specplug.contract.hooks import SpeculatorHooks, hookspec
from specplug.errors import PluginError
from specplug.plugins import implementations as hooks_module
from specplug.plugins import registry as registry_module
from specplug.plugins.calls import HookCall
from specplug.plugins.implementations import HOOKS

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPT = "x = [0, 0, 0, 0,"


class LaterHooks:
    """The five hooks of a later core: each has one argument more."""

    @hookspec(firstresult=True)
    def load_speculator(self, config: Any, target: Any, host: Any) -> Any: ...

    @hookspec(firstresult=True)
    def plan_memory(self, budget: Any, host: Any) -> Any: ...

    @hookspec(firstresult=True)
    def warmup(self, resources: Any, host: Any) -> None: ...

    @hookspec(firstresult=True)
    def propose(self, batch: Any, host: Any) -> Any: ...

    @hookspec(firstresult=True)
    def verify(self, batch: Any, proposal: Any, target: Any, host: Any) -> Any: ...


class Older:
    """Written for today's hooks; it takes even less where it needs less."""

    def __init__(self) -> None:
        self.called: list[str] = []

    @hookimpl
    def plan_memory(self) -> list[Any]:
        self.called.append("plan_memory")
        return []

    @hookimpl
    def warmup(self) -> None:
        self.called.append("warmup")

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        self.called.append("propose")
        return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])

    @hookimpl
    def verify(self, batch: Any) -> None:
        self.called.append("verify")


class OlderObserver:
    def __init__(self) -> None:
        self.called: list[str] = []

    @hookimpl(wrapper=True)
    def propose(self) -> Any:
        self.called.append("propose")
        return (yield)

    @hookimpl(wrapper=True)
    def verify(self, proposal: Any) -> Any:
        self.called.append("verify")
        return (yield)


class Newer:
    """Written for the later hooks."""

    def __init__(self) -> None:
        self.hosts: list[Any] = []

    @hookimpl
    def propose(self, batch: Any, host: Any) -> Proposal:
        self.hosts.append(host)
        return Proposal([[] for _ in batch.rows])


@pytest.fixture
def later_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core whose hooks have one argument more, and which passes it at every call."""
    for module in (registry_module, hooks_module):
        monkeypatch.setattr(module, "SpeculatorHooks", LaterHooks)
    call = HookCall.__call__
    monkeypatch.setattr(HookCall, "__call__", lambda self, **arguments: call(self, host="later", **arguments))


def generate(plugins: dict[str, Any], method: str | None) -> list[int]:
    config = {"method": method, "num_speculative_tokens": 3} if method else None
    with LLM("tiny", dtype="float32", strict=True, plugins=plugins, speculative_config=config) as llm:
        return llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids


def test_the_later_hooks_are_todays_and_one_argument_more() -> None:
    for hook in HOOKS:
        arguments = getattr(LaterHooks, hook).__annotations__.keys() - {"host"}
        assert arguments == getattr(SpeculatorHooks, hook).__annotations__.keys()


@pytest.mark.usefixtures("later_core")
def test_a_plugin_of_the_older_signature_works() -> None:
    expected = generate({}, None)
    older, observer = Older(), OlderObserver()
    plugins = {"older": lambda config, target: older, "observer": observer}
    assert generate(plugins, "older") == expected
    assert set(older.called) == {"plan_memory", "warmup", "propose", "verify"}
    assert set(observer.called) == {"propose", "verify"}


@pytest.mark.usefixtures("later_core")
def test_one_of_the_newer_signature_gets_the_argument() -> None:
    newer = Newer()
    generate({"newer": lambda config, target: newer}, "newer")
    assert set(newer.hosts) == {"later"}


def test_to_todays_core_the_newer_signature_is_one_clear_error() -> None:
    newer = Newer()
    message = r"plugin 'newer', hook 'propose': there is no argument 'host' in specplug 0\.\S+ \(arguments: batch\)"
    with pytest.raises(PluginError, match=message):
        generate({"newer": lambda config, target: newer}, "newer")


def test_a_hook_of_a_later_core_may_be_implemented_as_optional() -> None:
    class Ahead(Older):
        @hookimpl(optionalhook=True)
        def digest(self, report: Any) -> None: ...

    assert generate({"ahead": lambda config, target: Ahead()}, "ahead") == generate({}, None)


def test_a_deprecated_argument_warns_those_who_name_it_and_is_still_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deprecating(SpeculatorHooks):
        @hookspec(firstresult=True, warn_on_impl_args={"budget": DeprecationWarning("ask resources instead")})
        def plan_memory(self, budget: Any) -> Any: ...

    class Naming(Older):
        @hookimpl
        def plan_memory(self, budget: Any) -> list[Any]:
            self.called.append(type(budget).__name__)
            return []

    for module in (registry_module, hooks_module):
        monkeypatch.setattr(module, "SpeculatorHooks", Deprecating)
    naming = Naming()
    with pytest.warns(DeprecationWarning, match="ask resources instead"):
        generate({"naming": lambda config, target: naming}, "naming")
    assert naming.called[0] == "MemoryBudget"
