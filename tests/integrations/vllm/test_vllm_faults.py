"""What a plugin does wrong in vLLM costs its drafts; what vLLM cannot give is refused by name before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: see CONTRIBUTING.md")

from support.vllm_engine import PROMPTS, start

pytestmark = pytest.mark.slow
Plain = Callable[..., list[list[int]]]


def provided(name: str) -> dict[str, Any]:
    return {"plugins": {name: f"plugins_under_test:{name}"}}


@pytest.mark.parametrize("name", ["raises", "garbage", "exits"])
def test_three_faults_in_a_row_switch_it_off(name: str, plain: Plain, modules: Path) -> None:
    expected = plain(PROMPTS)
    with start({"method": name}, host=provided(name)) as engine:
        assert engine.greedy(PROMPTS) == expected
        host = engine.proposer.host
        assert (host.faults, host.enabled) == ({name: 3}, {name: False})
        assert host.stats.num_draft_tokens == 0


def test_one_that_keeps_state_is_asked_once_for_a_row(plain: Plain, modules: Path) -> None:
    """Its state of the rows of a failed call may be half-updated, so only rows that come later are shown to it."""
    expected = plain(PROMPTS)
    with start({"method": "raises_late"}, host=provided("raises_late")) as engine:
        assert engine.greedy(PROMPTS[:2]) == expected[:2]
        host = engine.proposer.host
        assert (host.faults, host.enabled) == ({"raises_late": 1}, {"raises_late": True})
        before = host.stats.num_draft_tokens
        assert engine.greedy(PROMPTS[2:]) == expected[2:]
        assert (host.faults, host.enabled) == ({"raises_late": 1}, {"raises_late": True})
        assert host.stats.num_draft_tokens > before + 20


def test_one_that_hangs_is_left_alone(plain: Plain, modules: Path) -> None:
    expected = plain(PROMPTS)
    with start({"method": "hangs"}, host={**provided("hangs"), "timeout": 0.5}) as engine:
        started = time.perf_counter()
        assert engine.greedy(PROMPTS) == expected
        assert time.perf_counter() - started < 15
        assert (engine.proposer.host.faults, engine.proposer.host.enabled) == ({"hangs": 1}, {"hangs": False})


def test_now_and_then(plain: Plain, modules: Path) -> None:
    expected = plain(PROMPTS)
    with start({"method": "now_and_then"}, host=provided("now_and_then")) as engine:
        assert engine.greedy(PROMPTS) == expected
        host = engine.proposer.host
        assert host.enabled == {"now_and_then": True}
        assert host.faults["now_and_then"] > 5
        assert host.stats.num_accepted_draft_tokens > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sharing", "speculator 'sharing' plans the KV cache 'kv' with tables='shared'"),
        ("verifying", "speculator 'verifying' has a verify of its own"),
        ("reading", "speculator 'reading' reads target states .* start vLLM with --worker-cls specplug_vllm.Worker"),
        ("missing", "no speculator named 'missing'"),
    ],
)
def test_refusals(name: str, message: str, modules: Path) -> None:
    host = provided(name) if name != "missing" else {}
    with pytest.raises(Exception, match=message), start({"method": name}, host=host):
        pass


def test_what_is_wrong_in_the_configuration() -> None:
    for additional, message in [
        ({}, 'additional_config needs the key "specplug"'),
        ({"specplug": {"method": "ngram", "num_speculative_tokens": 9}}, "9 draft tokens are asked for"),
        ({"specplug": {"method": "ngram"}, "specplug_host": {"timeou": 1}}, "unknown key specplug_host.timeou"),
    ]:
        with pytest.raises(Exception, match=message), start({"method": "ngram"}, additional_config=additional):
            pass


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.31.2")
    with (
        pytest.raises(Exception, match=r"checked with vLLM 0.32 and 0.33, and this is vLLM 0.31.2"),
        start({"method": "ngram"}),
    ):
        pass


def test_without_the_plugin_that_names_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specplug_vllm.proposer.SpecplugProposer.attach_runner", lambda self, runner: None)
    with pytest.raises(Exception, match="VLLM_PLUGINS"), start({"method": "ngram"}):
        pass
