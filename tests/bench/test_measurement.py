"""Real runs of the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from specplug import LLM, SamplingParams
from specplug.bench.measurement import Measurer
from specplug.bench.workload import PROMPTS, BenchPrompt, Cell, Workload
from specplug.errors import RequestError

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "memory": "512MiB", "max_num_seqs": 2}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", speculative_config=NGRAM, **OPTIONS) as llm:
        yield llm


@pytest.fixture
def measurer(llm: LLM) -> Iterator[Measurer]:
    measurer = Measurer(llm)
    yield measurer
    measurer.close()
    assert "forward" not in vars(llm.engine.runner)


def workload(llm: LLM, count: int = 3, max_tokens: int = 12) -> Workload:
    tokenizer = llm.get_tokenizer()
    prompts = [BenchPrompt(f"prompt {i}", tokenizer(text)["input_ids"]) for i, text in enumerate(PROMPTS[:count])]
    return Workload("test", prompts, max_tokens)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_run(llm: LLM, measurer: Measurer, batch: int) -> None:
    work = workload(llm)
    seen: list[int] = []
    requests = work.requests(batch)
    run = measurer.run(work, Cell(batch, 0.0), seen.append)
    assert run.tokens == sum(seen) == work.num_tokens(batch) == 12 * len(requests)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = llm.generate([prompt.ids for prompt in requests], params, use_tqdm=False)
    assert run.outputs == [output.outputs[0].token_ids for output in expected]
    assert len(run.first_token_seconds) == len(requests)
    assert len(run.token_seconds) == run.tokens - len(requests)
    assert 0 < min(run.first_token_seconds) < run.seconds
    assert sum(run.token_seconds) < batch * run.seconds
    assert run.stats is not None
    assert run.stats.num_steps + run.stats.num_accepted_draft_tokens == run.tokens
    assert run.faults == 0


@pytest.mark.parametrize("batch", [1, 2])
def test_the_steps_that_decode(llm: LLM, measurer: Measurer, batch: int) -> None:
    decode = measurer.run(workload(llm), Cell(batch, 0.0)).decode
    assert decode is not None
    assert decode.rows == batch * decode.steps > 0
    assert decode.tokens >= decode.rows
    assert 0 < decode.forward_seconds < decode.seconds
    assert 0 < decode.draft_seconds < decode.seconds - decode.forward_seconds


def test_runs_do_not_mix(llm: LLM, measurer: Measurer) -> None:
    first, second = (measurer.run(workload(llm, 1), Cell(1, 0.0)) for _ in range(2))
    assert first.decode is not None
    assert second.decode is not None
    assert first.decode.steps == second.decode.steps
    assert first.outputs == second.outputs


def test_a_run_that_fails_leaves_nothing_behind(llm: LLM, measurer: Measurer) -> None:
    bad = Workload("test", [*workload(llm, 1).prompts, BenchPrompt("the bad one", [99_999])], 8)
    with pytest.raises(RequestError, match="the bad one"):
        measurer.run(bad, Cell(2, 0.0))
    assert not llm.engine.has_unfinished_requests
    assert measurer.run(workload(llm, 1), Cell(1, 0.0)).tokens == 8 + 4


def test_a_sequence_that_is_too_long_is_named() -> None:
    work = Workload("test", [BenchPrompt("short", [1]), BenchPrompt("prompts.jsonl, line 2", [1] * 90)], 20)
    work.check_length(110)
    with pytest.raises(RequestError, match=r"^prompts.jsonl, line 2: 90 prompt tokens and 20 to generate are more"):
        work.check_length(109)
