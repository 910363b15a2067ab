"""Plain decoding on a device that computes while the host goes on: the next step starts before the last one's tokens are known.

A CPU is treated as such a device; what is computed is the same.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, Proposal, ProposalBatch, SamplingParams, hookimpl
from support.engines import assert_idle, squeeze_blocks
from support.models import VOCABULARY
from support.speculators import Oracle, TokenSpeculator, provide

ROWS = 12
TIGHT: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 16, "block_size": 4, "max_model_len": 96}


class Draws:
    """Counts the steps that ran ahead."""

    def __init__(self, llm: LLM) -> None:
        self.count = 0
        verification: Any = llm.engine._verification
        draw = verification.draw

        def counted(*args: Any) -> torch.Tensor:
            self.count += 1
            result: torch.Tensor = draw(*args)
            return result

        verification.draw = counted


def requests(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and parameters of every kind that may run ahead, and of some that may not."""
    numbers = random.Random(seed)
    prompts = [[numbers.randrange(3, VOCABULARY) for _ in range(numbers.randint(1, 12))] for _ in range(ROWS)]
    params = []
    for row in range(ROWS):
        kind = row % 6
        options: dict[str, Any] = {"max_tokens": numbers.randint(1, 24), "temperature": 0}
        if kind == 1:
            options |= {"temperature": 1.0, "seed": row}
        elif kind == 2:
            options |= {"temperature": 0.7, "top_k": 5, "seed": row, "n": 2}
        elif kind == 3:
            options |= {"logprobs": 2, "repetition_penalty": 1.2}
        elif kind == 4:
            options |= {"ignore_eos": True, "stop": [f"w{numbers.randrange(3, VOCABULARY)}"]}
        elif kind == 5:
            options |= {"stop_token_ids": [numbers.randrange(3, VOCABULARY) for _ in range(6)], "min_tokens": 3}
        params.append(SamplingParams(**options))
    return prompts, params


def outputs(llm: LLM, seed: int) -> list[Any]:
    prompts, params = requests(seed)
    return [
        [(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in output.outputs]
        for output in llm.generate(prompts, params)
    ]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specplug.engine.startup.allocation.computes_ahead", lambda device: True)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, list[Any]]:
    with LLM(folder, memory="32MiB", strict=True) as llm:
        return {seed: outputs(llm, seed) for seed in range(3)}


@pytest.mark.usefixtures("ahead")
def test_output_is_that_of_steps_in_turn(folder: Path, expected: dict[int, list[Any]]) -> None:
    with LLM(folder, memory="32MiB", strict=True) as llm:
        draws = Draws(llm)
        assert {seed: outputs(llm, seed) for seed in expected} == expected
        assert_idle(llm)
        assert draws.count > 20


@pytest.mark.usefixtures("ahead")
def test_rows_wait_join_and_are_preempted(folder: Path, expected: dict[int, list[Any]]) -> None:
    with LLM(folder, memory="32MiB", strict=True, **TIGHT) as llm:
        squeeze_blocks(llm, 24)
        draws = Draws(llm)
        assert {seed: outputs(llm, seed) for seed in expected} == expected
        assert_idle(llm)
        assert draws.count > 20
        assert llm.engine.scheduler.num_preemptions > 0


@pytest.mark.usefixtures("ahead")
def test_requests_end_and_fail_alone_while_their_tokens_are_in_flight(folder: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    with LLM(folder, memory="32MiB", strict=True) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
        engine: Any = llm.engine
        rows = [engine.add_request(str(number), ids, greedy)[0] for number, ids in enumerate(prompts)]
        delivered: dict[str, list[int]] = {row.id: [] for row in rows}

        def step() -> None:
            for output in engine.step():
                delivered[output.request.id] += output.new_tokens

        for _ in range(4):
            step()
        assert all(row.in_flight is not None for row in rows)
        (ended,) = engine.abort("1")
        assert ended.output_ids == expected[1][: ended.num_output_tokens]
        aborted = delivered.pop("1")
        draw = engine._verification.draw
        engine._verification.draw = lambda requests, logits: torch.where(
            torch.tensor([request.id == "2" for request in requests]), -1, draw(requests, logits)
        )
        step()
        engine._verification.draw = draw
        while engine.has_unfinished_requests:
            step()
        assert rows[0].output_ids == delivered["0"] == expected[0]
        assert aborted == expected[1][: len(aborted)]
        assert "NaN" in str(rows[2].error)
        assert rows[2].output_ids == delivered["2"] == expected[2][: rows[2].num_output_tokens]
        assert 0 < rows[2].num_output_tokens < 12
        assert_idle(llm)


@pytest.mark.usefixtures("ahead")
def test_an_interrupted_step_loses_nothing(folder: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [[3, 4, 5], [6, 7]]
    with LLM(folder, memory="32MiB", strict=True) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
        engine: Any = llm.engine
        rows = [engine.add_request(str(number), ids, greedy)[0] for number, ids in enumerate(prompts)]
        for _ in range(4):
            engine.step()
        forward, engine.runner.forward = engine.runner.forward, None
        with pytest.raises(TypeError):
            engine.step()
        engine.runner.forward = forward
        assert all(row.in_flight is None and row.slot < 0 for row in rows)
        while engine.has_unfinished_requests:
            engine.step()
        assert [row.output_ids for row in rows] == expected
        assert_idle(llm)


@pytest.mark.usefixtures("ahead")
def test_text_is_decoded_while_the_device_computes(folder: Path) -> None:
    """What a step committed is delivered after the next one has started; the last ones wait for nobody."""
    order: list[str] = []
    with LLM(folder, memory="32MiB", strict=True) as llm:
        engine: Any = llm.engine
        (row,) = engine.add_request("0", [3, 4, 5], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        forward, take = engine.runner.forward, row.text.take
        engine.runner.forward = lambda *args, **keys: order.append("forward") or forward(*args, **keys)
        row.text.take = lambda count: order.append("text") or take(count)
        while engine.has_unfinished_requests:
            engine.step()
    assert order == ["forward", "forward", "text", "forward", "text", "forward", "text", "text"]


@pytest.mark.usefixtures("ahead")
def test_an_end_is_told_with_the_last_tokens(folder: Path) -> None:
    """Whoever calls `step` counts ends: each is seen once, and every token has been seen by then."""
    numbers = random.Random(0)
    oracle = Oracle([[3 + number % 60 for number in range(90)]], VOCABULARY, 0.7)
    options = provide(lambda config, target: TokenSpeculator(oracle))
    for own in ({}, options):
        with LLM(folder, memory="32MiB", strict=True, max_num_seqs=4, **own) as llm:
            engine: Any = llm.engine
            lengths = [numbers.randint(1, 9) for _ in range(12)]
            for number, length in enumerate(lengths):
                engine.add_request(
                    str(number), [3 + number, 4], SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
                )
            seen: dict[str, list[int]] = {str(number): [] for number in range(12)}
            ended = []
            while engine.has_unfinished_requests:
                outputs = engine.step()
                assert len({output.request.id for output in outputs}) == len(outputs)
                for output in outputs:
                    seen[output.request.id] += output.new_tokens
                    assert len(output.texts) == len(output.new_tokens)
                    if output.request.is_finished:
                        ended.append(output.request.id)
                        assert seen[output.request.id] == output.request.output_ids
            assert sorted(ended) == sorted(seen)
            assert [len(tokens) for tokens in seen.values()] == lengths


@pytest.mark.usefixtures("ahead")
def test_rows_whose_drafts_do_not_pay_run_ahead_too(folder: Path) -> None:
    """With automatic lengths; speculators are asked again now and then, and are told of every end."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    prompts = [[3 + row, 4, 5] for row in range(6)]
    with LLM(folder, memory="32MiB", strict=True) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    wrong = Oracle([], VOCABULARY, 0.0)
    slow: dict[str, Any] = provide(lambda config, target: SlowSpeculator(wrong))
    slow["speculative_config"]["num_speculative_tokens"] = "auto"
    with LLM(folder, memory="32MiB", strict=True, max_num_seqs=4, **slow) as llm:
        draws = Draws(llm)
        for _ in range(3):
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
        assert_idle(llm)
        assert 50 < draws.count < llm.engine.num_steps
        assert llm.engine.stats.num_draft_tokens > 0
        assert not llm.engine.chain._proposers
        assert not any(link.delivered for link in llm.engine.chain._links)


class SlowSpeculator(TokenSpeculator):
    """Its drafts cost more than a step."""

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        time.sleep(0.02)
        return super().propose(batch)
