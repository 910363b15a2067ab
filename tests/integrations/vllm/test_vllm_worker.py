"""`--worker-cls specplug_vllm.Worker`: target states, KV caches of speculators, and draft probabilities, in vLLM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: see CONTRIBUTING.md")

from specplug import LLM, SamplingParams
from support.statistics import homogeneity_p_value
from support.vllm_engine import NUM_TOKENS, PROMPTS, start

pytestmark = pytest.mark.slow
Plain = Callable[..., list[list[int]]]
EAGLE3 = {"method": "eagle3", "model": "tiny"}
DRAFT_MODEL = {"method": "draft_model", "model": "tiny"}
CHECKING = {"method": "checking"}
HOST = {
    "plugins": {
        name: f"plugins_under_test:{name}" for name in ("checking", "raises_with_states", "sharing", "verifying")
    }
}
ROUNDS = 30


def method_of(engine: Any) -> Any:
    """The speculator itself."""
    (speculator,) = engine.proposer.host.speculators
    return speculator.instance


def own_stats(config: dict[str, Any], prompts: list[str], params: SamplingParams) -> Any:
    """What specplug's own engine counts with the same method."""
    own = {**config, "num_speculative_tokens": NUM_TOKENS}
    with LLM("tiny", dtype="float32", max_num_seqs=4, max_model_len=256, speculative_config=own) as llm:
        llm.generate(prompts, params)
        return llm.engine.stats


@pytest.mark.parametrize("config", [EAGLE3, DRAFT_MODEL], ids=["eagle3", "draft_model"])
def test_output_and_acceptance(config: dict[str, Any], plain: Plain, modules: Path) -> None:
    expected = plain(PROMPTS)
    with start(config, host=HOST, worker=True) as engine:
        assert engine.greedy(PROMPTS) == expected
        stats = engine.proposer.host.stats
        assert engine.proposer.host.faults == {config["method"]: 0}
    own = own_stats(config, PROMPTS, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
    assert stats.num_accepted_draft_tokens > 100
    assert stats.mean_acceptance_length == pytest.approx(own.mean_acceptance_length, abs=0.15)


@pytest.mark.parametrize("config", [EAGLE3, CHECKING], ids=["eagle3", "checking"])
def test_rows_join_and_leave(config: dict[str, Any], plain: Plain, modules: Path) -> None:
    """Prompts in pieces of any length; then all again, whose first tokens are in vLLM's prefix cache."""
    prompts, lengths = PROMPTS * 2, [5, 40, 17, 60, 9, 33, 1, 24, 2, 50]
    prompts = [
        "# a long line that is the same for all prompts, and longer than a block of vLLM\n" * 2 + p for p in prompts
    ]
    expected = plain(prompts, lengths)
    options: dict[str, Any] = {
        "max_num_seqs": 3,
        "max_num_batched_tokens": 32,
        "enable_chunked_prefill": True,
        "block_size": 32,
    }
    with start(config, host=HOST, worker=True, **options) as engine:
        assert engine.greedy(prompts, lengths) == expected
        assert engine.proposer.host.stats.num_accepted_draft_tokens > 0
        assert engine.greedy(prompts, lengths) == expected
        assert engine.proposer.host.faults == {config["method"]: 0}
        if config == CHECKING:
            checking = method_of(engine)
            assert {0} < set(checking.starts)
            assert checking.positions > 2 * sum(lengths) - 4 * len(lengths)
            assert checking.nodes > 100


@pytest.mark.parametrize("config", [EAGLE3, CHECKING], ids=["eagle3", "checking"])
def test_preemption(config: dict[str, Any], plain: Plain, modules: Path) -> None:
    lengths = [150] * 5
    expected = plain(PROMPTS, lengths)
    with start(config, host=HOST, worker=True, block_size=32, num_gpu_blocks_override=14) as engine:
        ends: list[str] = []
        end = engine.proposer.host.end

        def noted(row: Any, reason: Any = "finished") -> None:
            ends.append(reason)
            end(row, reason)

        engine.proposer.host.end = noted
        assert engine.greedy(PROMPTS, lengths) == expected
        assert engine.proposer.host.faults == {config["method"]: 0}
        assert "preempted" in ends


def test_abort(plain: Plain, modules: Path) -> None:
    expected = plain(PROMPTS)
    with start(EAGLE3, host=HOST, worker=True) as engine:
        done = engine.greedy_but_aborted(PROMPTS[:3], 1)
        assert [done[0], done[2]] == [expected[0], expected[2]]
        assert engine.greedy(PROMPTS) == expected
        assert len(engine.proposer.known_rows()) <= 4
        assert engine.proposer.host.faults == {"eagle3": 0}


def test_one_that_raises_costs_its_drafts(plain: Plain, modules: Path) -> None:
    expected = plain(PROMPTS)
    config = {"method": "raises_with_states", "fallback": EAGLE3}
    with start(config, host=HOST, worker=True) as engine:
        assert engine.greedy(PROMPTS) == expected
        host = engine.proposer.host
        assert host.faults["raises_with_states"] >= 1
        assert host.faults["eagle3"] == 0
        assert host.stats.num_accepted_draft_tokens > 0


def test_without_states(plain: Plain) -> None:
    """A plugin that reads none drafts as without the worker, and without speculation it is vLLM's own."""
    expected = plain(PROMPTS)
    with start({"method": "suffix"}, worker=True) as engine:
        assert engine.greedy(PROMPTS) == expected
        assert engine.proposer.host.stats.num_accepted_draft_tokens > 20
    with start(None, worker=True) as engine:
        assert engine.greedy(PROMPTS) == expected


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CHECKING, {"enable_lora": True}, "top_k cannot be combined with enable_lora"),
        ({"method": "sharing"}, {}, "speculator 'sharing' plans the KV cache 'kv' with tables='shared'"),
        ({"method": "verifying"}, {}, "speculator 'verifying' has a verify of its own"),
    ],
)
def test_refusals(config: dict[str, Any], options: dict[str, Any], message: str, modules: Path) -> None:
    with pytest.raises(Exception, match=message), start(config, host=HOST, worker=True, **options):
        pass


def test_a_target_without_inner_states(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models import interfaces

    monkeypatch.setattr(interfaces, "supports_eagle3", lambda model: False)
    message = r"at the boundaries 4, 8, 12, and vLLM's LlamaForCausalLM delivers none"
    with pytest.raises(Exception, match=message), start(EAGLE3, host=HOST, worker=True):
        pass


def test_sampled_output_and_acceptance(repaired_sampler: None, modules: Path) -> None:
    """Sampled drafts: vLLM's sampler gets their distributions, so more are accepted, and output is the target's."""
    from vllm import SamplingParams as VllmParams

    prompt, temperature = "x = [0, 1, 0, 1, 0, 1,", 0.8

    def outputs(config: Any, *, hands_probs: bool = True, heat: float = temperature) -> tuple[Counter[Any], Any]:
        with start(config, host=HOST, worker=config is not None, max_num_seqs=64) as engine:
            if not hands_probs:
                engine.proposer.take_draft_probs = lambda: None
            params = VllmParams(temperature=heat, n=64, max_tokens=5, ignore_eos=True)
            found: Counter[Any] = Counter()
            for _ in range(ROUNDS):
                completions = engine.llm.generate([prompt], params, use_tqdm=False)[0].outputs
                found.update(tuple(output.token_ids[1:4]) for output in completions)
            return found, None if config is None else engine.proposer.host.stats

    plain, _ = outputs(None)
    with_probs, stats = outputs(EAGLE3)
    assert homogeneity_p_value(with_probs, plain) > 1e-3
    assert homogeneity_p_value(outputs(None, heat=0.7)[0], plain) < 1e-6, "too weak to see another temperature"
    without_probs, fewer = outputs(EAGLE3, hands_probs=False)
    assert homogeneity_p_value(without_probs, plain) > 1e-3
    params = SamplingParams(temperature=temperature, max_tokens=5, ignore_eos=True)
    own = own_stats(EAGLE3, [prompt] * 400, params)
    rates = [each.mean_acceptance_length for each in (stats, own, fewer)]
    assert rates[0] == pytest.approx(rates[1], abs=0.2)
    assert rates[2] < min(rates[:2]) - 0.1
