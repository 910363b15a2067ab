"""Plugins are found by entry point, loaded one by one, and never disturb each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from specplug.contract.hooks import hookimpl
from specplug.contract.settings import SpeculativeConfig
from specplug.errors import ConfigurationError, PluginError
from specplug.plugins.finder import find_plugins
from specplug.plugins.registry import PluginRegistry

GOOD = """
from specplug import Proposal, hookimpl
class Empty:
    def __init__(self, method): self.method = method
    @hookimpl
    def propose(self, batch): return Proposal([[] for _ in batch.rows])
@hookimpl
def load_speculator(config): return Empty(config.method)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, name: str, source: str, entry_points: dict[str, str], requires: str = "specplug>=0.1") -> None:
    """Writes what pip would leave behind for a package of one module."""
    module = name.replace("-", "_")
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\nSummary: s\nRequires-Dist: {requires}\n"
    )
    lines = "\n".join(f"{method} = {target}" for method, target in entry_points.items())
    (info / "entry_points.txt").write_text(f"[specplug]\n{lines}\n")
    sys.modules.pop(module, None)


def load(registry: PluginRegistry, method: str, **options: Any) -> Any:
    return registry.load_speculator(SpeculativeConfig(method, 3, options), None).instance


def status(method: str) -> tuple[str, str]:
    record = next(record for record in find_plugins() if record.method == method)
    return record.status, record.reason


def test_one_module_may_serve_several_methods(site: Path) -> None:
    install(site, "two-in-one", GOOD, {"first": "two_in_one", "second": "two_in_one"})
    registry = PluginRegistry()
    assert load(registry, "first").method == "first"
    assert load(registry, "second").method == "second"


def test_an_entry_point_may_name_an_object(site: Path) -> None:
    source = (
        GOOD
        + "\nclass Plugin:\n    @hookimpl\n    def load_speculator(self, config): return Empty('inner')\nplugin = Plugin()\n"
    )
    install(site, "object-plugin", source, {"object": "object_plugin:plugin"})
    assert load(PluginRegistry(), "object").method == "inner"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "SystemExit"),
        (GOOD + "\n@hookimpl\ndef propse(batch): ...", "propse"),
        (GOOD.replace("def load_speculator(config)", "def load_speculator(config=None)"), "has a default"),
        (GOOD.replace("def load_speculator(config)", "def load_speculator(settings)"), "settings"),
        (GOOD + "\n@hookimpl(hookwrapper=True)\ndef verify(batch): yield", "hookwrapper"),
    ],
)
def test_a_broken_plugin_stops_only_those_who_ask_for_it(site: Path, source: str, text: str) -> None:
    install(site, "broken-one", source, {"broken": "broken_one"})
    install(site, "good-one", GOOD, {"good": "good_one"})
    registry = PluginRegistry()
    assert load(registry, "good").method == "good"
    assert not registry.failures, "what nobody asks for is not even imported"
    with pytest.raises(PluginError, match=f"'broken' of package broken-one cannot be loaded: .*{text}"):
        load(registry, "broken")
    assert load(registry, "good").method == "good"


def test_statuses_from_metadata(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "plain-one", GOOD, {"plain": "plain_one"})
    install(site, "future-one", GOOD, {"future": "future_one"}, requires="specplug>=99")
    install(site, "rival-a", GOOD, {"rival": "rival_a"})
    install(site, "rival-b", GOOD, {"rival": "rival_b"})
    assert status("plain")[0] == "ok"
    assert status("future")[0] == "incompatible"
    assert ">=99" in status("future")[1]
    assert status("rival")[0] == "ambiguous"
    assert "rival-a, rival-b" in status("rival")[1]
    monkeypatch.setenv("SPECPLUG_DENY_PLUGINS", "rival_b, plain")
    assert status("rival")[0] == "ok"
    assert status("plain") == ("blocked", "on the deny-list")
    monkeypatch.setenv("SPECPLUG_ALLOW_PLUGINS", "Rival.A")
    assert status("future") == ("blocked", "not on the allow-list")
    with pytest.raises(PluginError, match="is blocked: not on the allow-list"):
        load(PluginRegistry(), "future")


def test_two_registries_share_nothing(site: Path) -> None:
    install(site, "shared-one", GOOD, {"shared": "shared_one"})
    one, two = PluginRegistry(), PluginRegistry()
    first, second = load(one, "shared"), load(two, "shared")
    assert first is not second
    assert not two.manager.is_registered(first)


def test_options_are_structured_and_checked() -> None:
    import attrs

    @attrs.frozen
    class Settings:
        window: int
        ratio: float = 0.5

    def structure(**options: Any) -> Settings:
        return SpeculativeConfig("demo", 3, options).settings(Settings)

    assert structure(window=3, ratio=1) == Settings(3, 1.0)
    for options, text in (
        ({}, "needs the key 'window'"),
        ({"window": "3"}, "window"),
        ({"window": True}, "window"),
        ({"window": 3, "windw": 4}, "unknown key 'windw'.*did you mean 'window'"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            structure(**options)


@pytest.mark.parametrize("wrapper", [True, False])
def test_only_a_verify_that_decides_counts_as_the_plugins_own(wrapper: bool) -> None:
    """A wrapper looks, whether it is a method of the speculator or a function of its module."""

    class Judge:
        @hookimpl
        def propose(self, batch: Any) -> Any: ...

        @hookimpl(wrapper=wrapper)
        def verify(self, batch: Any) -> Any:
            return (yield)

    registry = PluginRegistry(provided={"judge": lambda config, target: Judge()})
    assert registry.load_speculator(SpeculativeConfig("judge", 3), None).overrides_verify == (not wrapper)
    assert registry.observes("verify") == wrapper


@pytest.mark.parametrize("hook", ["load_speculator", "propose"])
def test_a_wrapper_does_not_stand_for_the_hook_itself(hook: str) -> None:
    class Watcher:
        @hookimpl(wrapper=True)
        def propose(self, batch: Any) -> Any:
            return (yield)

    class Plugin:
        @hookimpl(wrapper=True)
        def load_speculator(self, config: Any) -> Any:
            return (yield)

    provided = Plugin() if hook == "load_speculator" else lambda config, target: Watcher()
    with pytest.raises(PluginError, match=f"'watcher'.* has no @hookimpl .* '{hook}'"):
        load(PluginRegistry(provided={"watcher": provided}), "watcher")
