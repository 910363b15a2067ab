"""Greedy output in vLLM is vLLM's own, whatever drafts; acceptance is that of specplug's own engine."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: see CONTRIBUTING.md")

from specplug import LLM, SamplingParams
from support.environment import ROOT
from support.pages import blocks_of
from support.statistics import homogeneity_p_value
from support.vllm_engine import NUM_TOKENS, PROMPTS, start

pytestmark = pytest.mark.slow
NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
SUFFIX = {"method": "suffix"}
LAST_SEEN = {"method": "last_seen"}
CHAIN = {**SUFFIX, "fallback": NGRAM}
Plain = Callable[..., list[list[int]]]


HOST = {"plugins": {"last_seen": "last_seen"}}


@pytest.fixture
def last_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten-line plugin of README.md as the file that docs/vllm.md shows."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "last_seen", raising=False)
    source = next(block.text for block in blocks_of(ROOT / "docs/vllm.md") if block.file == "last_seen.py")
    (tmp_path / "last_seen.py").write_text(source, encoding="utf-8")


@pytest.mark.parametrize("config", [NGRAM, SUFFIX, LAST_SEEN, CHAIN], ids=["ngram", "suffix", "last_seen", "fallback"])
def test_output_and_acceptance(config: dict[str, Any], plain: Plain, last_seen: None) -> None:
    expected = plain(PROMPTS)
    with start(config, host=HOST) as engine:
        assert engine.greedy(PROMPTS) == expected
        stats = engine.proposer.host.stats
        assert sum(engine.proposer.host.faults.values()) == 0
    own = {**config, "num_speculative_tokens": NUM_TOKENS}
    with LLM(
        "tiny",
        dtype="float32",
        max_num_seqs=4,
        max_model_len=256,
        speculative_config=own,
        plugins={"last_seen": importlib.import_module("last_seen")},
    ) as llm:
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
        own_stats = llm.engine.stats
    assert stats.num_accepted_draft_tokens > 20
    if config in (NGRAM, LAST_SEEN):  # the same chains for the same tokens; vLLM counts the last step of a request too
        assert stats.num_accepted_draft_tokens == pytest.approx(
            own_stats.num_accepted_draft_tokens, abs=len(PROMPTS) * 2
        )
    spread = 4 * NUM_TOKENS / (2 * min(stats.num_spec_steps, own_stats.num_spec_steps) ** 0.5)
    assert stats.mean_acceptance_length is not None
    assert stats.mean_acceptance_length == pytest.approx(own_stats.mean_acceptance_length, abs=min(0.5, spread))


def test_vllm_counts_the_same(plain: Plain) -> None:
    expected = plain(PROMPTS)
    with start(NGRAM) as engine:
        assert engine.greedy(PROMPTS) == expected
        found = {metric.name: metric for metric in engine.llm.get_metrics()}
        stats = engine.proposer.host.stats
    drafted = found["vllm:spec_decode_num_draft_tokens"].value
    accepted = found["vllm:spec_decode_num_accepted_tokens"].value
    assert 0 < accepted <= stats.num_accepted_draft_tokens
    assert accepted >= stats.num_accepted_draft_tokens - NUM_TOKENS * len(
        PROMPTS
    )  # what was behind the end of a request
    assert drafted == pytest.approx(stats.num_draft_tokens, abs=NUM_TOKENS * len(PROMPTS))


@pytest.mark.parametrize("config", [NGRAM, SUFFIX], ids=["ngram", "suffix"])
def test_rows_join_and_leave(config: dict[str, Any], plain: Plain) -> None:
    prompts, lengths = PROMPTS * 2, [5, 40, 17, 60, 9, 33, 1, 24, 2, 50]
    expected = plain(prompts, lengths)
    with start(config, max_num_seqs=3, max_num_batched_tokens=32, enable_chunked_prefill=True) as engine:
        assert engine.greedy(prompts, lengths) == expected
        assert engine.proposer.host.stats.num_accepted_draft_tokens > 0
        assert engine.greedy(prompts, lengths) == expected  # from vLLM's prefix cache
        assert sum(engine.proposer.host.faults.values()) == 0


def test_every_row_is_announced(plain: Plain, modules: Path) -> None:
    import plugins_under_test as under_test

    host = {"plugins": {"watching": "plugins_under_test:watching"}}
    lengths = [30, 12, 44, 7, 21]
    with start({"method": "watching"}, max_num_seqs=2, host=host) as engine:
        outputs = engine.greedy(PROMPTS, lengths)
        tokenizer = engine.llm.get_tokenizer()
        engine.greedy(["x"], 1)  # a step more, which delivers the last ends
        assert engine.proposer.host.faults == {"watching": 0}
    assert outputs == plain(PROMPTS, lengths)
    finished = [tokens for _, reason, tokens in under_test.ended if reason == "finished"]
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        whole = tokenizer(prompt)["input_ids"] + output
        assert any(tokens[: len(whole)] == whole for tokens in finished)


def test_preemption(plain: Plain, modules: Path) -> None:
    """Few KV blocks: rows lose theirs, and go on later."""
    import plugins_under_test as under_test

    host = {"plugins": {"watching": "plugins_under_test:watching"}}
    lengths = [150] * 5
    expected = plain(PROMPTS, lengths)
    with start({"method": "watching"}, block_size=32, num_gpu_blocks_override=14, host=host) as engine:
        assert engine.greedy(PROMPTS, lengths) == expected
        assert engine.proposer.host.faults == {"watching": 0}
    assert "preempted" in {reason for _, reason, _ in under_test.ended}
    with start(SUFFIX, block_size=32, num_gpu_blocks_override=14) as engine:
        assert engine.greedy(PROMPTS, lengths) == expected


def test_abort(plain: Plain) -> None:
    expected = plain(PROMPTS)
    with start(SUFFIX) as engine:
        done = engine.greedy_but_aborted(PROMPTS[:3], 1)
        assert [done[0], done[2]] == [expected[0], expected[2]]
        assert engine.greedy(PROMPTS) == expected
        assert len(engine.proposer.known_rows()) <= 4
        assert engine.proposer.host.faults == {"suffix": 0}


def test_json_schema() -> None:
    """A schema that leaves no choice but the values, without white space: every output ends in time."""
    from vllm.sampling_params import StructuredOutputsParams

    values: dict[str, Any] = {"kind": {"enum": ["stack", "queue"]}, "empty": {"type": "boolean"}}
    schema = {"type": "object", "properties": values, "required": [*values], "additionalProperties": False}
    compact = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
    outputs = []
    for config in (None, NGRAM):
        with start(config, **compact) as engine:
            options = {"structured_outputs": StructuredOutputsParams(json=schema), "ignore_eos": False}
            outputs.append(engine.greedy(PROMPTS, 64, **options))
            decode = engine.llm.get_tokenizer().decode
            if config is not None:
                assert engine.proposer.host.stats.num_draft_tokens > 0
                assert engine.proposer.host.faults == {"ngram": 0}
    assert outputs[0] == outputs[1]
    for output in outputs[1]:
        found = json.loads(decode(output, skip_special_tokens=True))
        assert set(found) == set(values)
        assert (found["kind"] in ("stack", "queue"), type(found["empty"])) == (True, bool)


def test_sampled_output_has_the_targets_distribution(repaired_sampler: None) -> None:
    """Three tokens after the first, of many outputs with and without drafts: a chi-square test of homogeneity.

    No top_k: vLLM 0.32 fails with it on a CPU, whatever method drafts (docs/vllm.md).
    """
    from vllm import SamplingParams as VllmParams

    def counts(config: Any, temperature: float) -> Counter[tuple[int, ...]]:
        with start(config, max_num_seqs=64) as engine:
            params = VllmParams(temperature=temperature, n=64, max_tokens=4, ignore_eos=True)
            found: Counter[tuple[int, ...]] = Counter()
            for _ in range(ROUNDS):
                outputs = engine.llm.generate(["x = [0, 1, 0, 1, 0, 1,"], params, use_tqdm=False)[0].outputs
                found.update(tuple(output.token_ids[1:4]) for output in outputs)
            if config is not None:
                stats = engine.proposer.host.stats
                assert stats.num_accepted_draft_tokens > 200
                assert stats.num_draft_tokens - stats.num_accepted_draft_tokens > 200
            return found

    plain = counts(None, 0.5)
    assert sum(plain.values()) == 64 * ROUNDS
    assert homogeneity_p_value(counts(NGRAM, 0.5), plain) > 1e-3
    assert homogeneity_p_value(counts(None, 0.4), plain) < 1e-6, "the test is too weak to see another temperature"


ROUNDS = 30
