"""Greedy output in vLLM is vLLM's own, whatever drafts; acceptance is that of specplug's own engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: see CONTRIBUTING.md")

from specplug import LLM, SamplingParams
from support.environment import ROOT
from support.pages import blocks_of
from support.vllm_engine import NUM_TOKENS, PROMPTS, start

pytestmark = pytest.mark.slow
NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
SUFFIX = {"method": "suffix"}
LAST_SEEN = {"method": "last_seen"}
CHAIN = {**SUFFIX, "fallback": NGRAM}
Plain = Callable[..., list[list[int]]]


@functools.cache
def readme_plugin() -> type:
    """The ten-line plugin of README.md, unchanged: the class of its first block that has one."""
    block = next(b for b in blocks_of(ROOT / "README.md") if b.language == "python" and "class LastSeen" in b.text)
    source = block.text.partition("\n\nllm =")[0]
    names: dict[str, Any] = {}
    exec(compile(source, block.name, "exec"), names)
    found: type = names["LastSeen"]
    return found


def last_seen(config: Any, target: Any) -> Any:
    return readme_plugin()()


HOST = {"plugins": {"last_seen": "test_vllm_output:last_seen"}}


@pytest.mark.parametrize("config", [NGRAM, SUFFIX, LAST_SEEN, CHAIN], ids=["ngram", "suffix", "last_seen", "fallback"])
def test_output_and_acceptance(config: dict[str, Any], plain: Plain, modules: Path) -> None:
    with start(config, host=HOST) as engine:
        assert engine.greedy(PROMPTS) == plain(PROMPTS)
        stats = engine.proposer.host.stats
        assert sum(engine.proposer.host.faults.values()) == 0
    own = {**config, "num_speculative_tokens": NUM_TOKENS}
    with LLM(
        "tiny",
        dtype="float32",
        max_num_seqs=4,
        max_model_len=256,
        speculative_config=own,
        plugins={"last_seen": last_seen},
    ) as llm:
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
        expected = llm.engine.stats
    assert stats.num_accepted_draft_tokens > 20
    if config in (NGRAM, LAST_SEEN):  # the same chains for the same tokens; vLLM counts the last step of a request too
        assert stats.num_accepted_draft_tokens == pytest.approx(
            expected.num_accepted_draft_tokens, abs=len(PROMPTS) * 2
        )
    spread = 4 * NUM_TOKENS / (2 * min(stats.num_spec_steps, expected.num_spec_steps) ** 0.5)
    assert stats.mean_acceptance_length is not None
    assert stats.mean_acceptance_length == pytest.approx(expected.mean_acceptance_length, abs=min(0.5, spread))


def test_vllm_counts_the_same(plain: Plain) -> None:
    with start(NGRAM) as engine:
        assert engine.greedy(PROMPTS) == plain(PROMPTS)
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
    from vllm import SamplingParams as VllmParams

    with start(SUFFIX) as engine:
        core = engine.llm.llm_engine
        for number, prompt in enumerate(PROMPTS[:3]):
            core.add_request(str(number), prompt, VllmParams(temperature=0, max_tokens=48, ignore_eos=True))
        for _ in range(4):
            core.step()
        core.abort_request(["1"])
        done: dict[str, list[int]] = {}
        while core.has_unfinished_requests():
            done |= {output.request_id: list(output.outputs[0].token_ids) for output in core.step() if output.finished}
        expected = plain(PROMPTS)
        assert [done["0"], done["2"]] == [expected[0], expected[2]]
        assert engine.greedy(PROMPTS) == expected
        assert len(engine.proposer.known_rows()) <= 4
        assert engine.proposer.host.faults == {"suffix": 0}


def test_json_schema(plain: Plain) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "tags": {"enum": ["a", "b"]}},
        "required": ["name", "tags"],
    }
    options: dict[str, Any] = {"structured_outputs": StructuredOutputsParams(json=schema)}
    with start(NGRAM) as engine:
        outputs = engine.greedy(PROMPTS[:2], 64, **options)
        texts = [engine.llm.get_tokenizer().decode(output, skip_special_tokens=True) for output in outputs]
    assert outputs == plain(PROMPTS[:2], 64, **options)
    assert any(text.lstrip().startswith("{") for text in texts)
    assert sum(set(json.loads(text)) == {"name", "tags"} for text in texts if text.rstrip().endswith("}")) >= 1


def test_sampled_output_has_the_targets_distribution() -> None:
    """The first two tokens of many sampled outputs, with and without drafts, by a test of homogeneity."""
    from scipy.stats import chi2_contingency
    from vllm import SamplingParams as VllmParams

    def counts(config: Any) -> dict[tuple[int, ...], int]:
        with start(config, max_num_seqs=64) as engine:
            params = VllmParams(temperature=0.7, top_k=4, n=64, max_tokens=3, ignore_eos=True)
            found: dict[tuple[int, ...], int] = {}
            for _ in range(20):
                for output in engine.llm.generate(["x = [0, 1, 0, 1, 0, 1,"], params, use_tqdm=False)[0].outputs:
                    key = tuple(output.token_ids[1:3])
                    found[key] = found.get(key, 0) + 1
            if config is not None:
                assert engine.proposer.host.stats.num_accepted_draft_tokens > 100
            return found

    drafted, own = counts(NGRAM), counts(None)
    keys = [key for key in drafted.keys() | own.keys() if drafted.get(key, 0) + own.get(key, 0) >= 20]
    table = [[each.get(key, 0) for key in keys] for each in (drafted, own)]
    rest = [sum(each.values()) - sum(row) for each, row in zip((drafted, own), table, strict=True)]
    table = [[*row, left] for row, left in zip(table, rest, strict=True)] if min(rest) else table
    assert chi2_contingency(table).pvalue > 1e-4
