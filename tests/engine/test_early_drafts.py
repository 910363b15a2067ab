"""Drafts that start before the host knows what verification accepted; output is that of steps in turn."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import specplug_eagle
from specplug import LLM, Proposal, ProposalBatch, SamplingParams, hookimpl
from support.drafting import perturbed_copy
from support.early import Early, early, outputs, treat_cpu_as_gpu
from support.engines import assert_idle, squeeze_blocks
from support.models import VOCABULARY, save_model
from support.reference import decisive_prompts

NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
TIGHT: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 40, "block_size": 4, "max_model_len": 72}


@pytest.fixture(autouse=True, params=[False, True], ids=["python", "staged"])
def ahead(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    treat_cpu_as_gpu(monkeypatch, staged=request.param)


def add(engine: Any, prompts: list[list[int]]) -> list[Any]:
    return [engine.add_request(str(number), ids, GREEDY)[0] for number, ids in enumerate(prompts)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_output_and_acceptance_are_those_of_steps_in_turn(tmp_path: Path, architecture: str) -> None:
    folder = save_model(tmp_path / "target", architecture)
    draft = perturbed_copy(folder, tmp_path / "draft", 0.03)
    pairs = decisive_prompts(folder, 8, NEW_TOKENS, VOCABULARY)
    prompts = [prompt for prompt, _ in pairs]
    found = []
    for drafts_early in (True, False):
        made: list[Early] = []
        options = early(draft, made, drafts_early)
        with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **options) as llm:
            assert outputs(llm, prompts, GREEDY) == [expected for _, expected in pairs]
            found.append(llm.engine.stats.num_accepted_draft_tokens)
            assert_idle(llm)
        assert made[0].num_early == 0 or made[0].num_early > 0.8 * made[0].num_calls > 5
        assert bool(made[0].num_early) == drafts_early
    assert found[0] == found[1] > 10


def test_a_head_that_reads_target_states(tmp_path: Path) -> None:
    prompts = [f"def {name}(values, limit):\n    " for name in ("first", "smallest", "add_all")]
    params = SamplingParams(temperature=0, max_tokens=32)
    head = str(Path(specplug_eagle.__file__).parent / "tiny")
    options: dict[str, Any] = {
        "dtype": "float32",
        "memory": "256MiB",
        "strict": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
    }
    with LLM("tiny", **options) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    found = []
    for drafts_early in (True, False):
        made: list[Early] = []
        with LLM("tiny", **options, **early(head, made, drafts_early, load=specplug_eagle.load_speculator)) as llm:
            for _ in range(2):  # the second time with hits of the prefix cache
                assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
            found.append(llm.engine.stats.num_accepted_draft_tokens)
            assert_idle(llm)
        assert bool(made[0].num_early) == drafts_early
        assert made[0].num_early > 20 or not drafts_early
    assert found[0] == found[1] > 40


def test_rows_join_wait_end_and_are_preempted(tmp_path: Path) -> None:
    """Prompts in chunks and rows that the host must look at are steps in turn; all others draft early."""
    folder = save_model(tmp_path / "target", "llama")
    draft = perturbed_copy(folder, tmp_path / "draft", 0.03)
    pairs = decisive_prompts(folder, 16, NEW_TOKENS, VOCABULARY)
    made: list[Early] = []
    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **TIGHT, **early(draft, made)) as llm:
        squeeze_blocks(llm, 20)
        for _ in range(2):  # the second time with hits of the prefix cache
            assert outputs(llm, [prompt for prompt, _ in pairs], GREEDY) == [expected for _, expected in pairs]
        assert llm.engine.scheduler.num_preemptions > 0
        assert llm.engine.stats.num_accepted_draft_tokens > 50
        assert_idle(llm)
    assert made[0].num_early > 10


def test_rows_of_every_kind_share_a_batch(tmp_path: Path) -> None:
    """Sampled, forked and scored rows, own draft lengths, stop tokens: the batch drafts early again once those have ended."""
    folder = save_model(tmp_path / "target", "llama")
    draft = perturbed_copy(folder, tmp_path / "draft", 0.03)
    numbers = random.Random(3)
    prompts = [[numbers.randrange(3, VOCABULARY) for _ in range(numbers.randint(1, 30))] for _ in range(18)]
    params = []
    for row in range(len(prompts)):
        options: dict[str, Any] = {"max_tokens": numbers.randint(1, 30), "temperature": 0, "ignore_eos": row % 2 == 0}
        options |= [
            {},
            {"num_speculative_tokens": row % 4},
            {"stop_token_ids": [numbers.randrange(3, VOCABULARY) for _ in range(8)]},
            {"temperature": 0.8, "seed": row},
            {"logprobs": 2},
            {"n": 2, "temperature": 0.9, "seed": row},
        ][row // 3]
        params.append(SamplingParams(**options))

    def run(llm: LLM) -> Any:
        return [
            [(one.token_ids, one.finish_reason, one.stop_reason) for one in output.outputs]
            for output in llm.generate(prompts, params)
        ]

    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB") as llm:
        expected = run(llm)
    made: list[Early] = []
    with LLM(
        folder, skip_tokenizer_init=True, strict=True, memory="64MiB", max_num_seqs=4, **early(draft, made)
    ) as llm:
        assert run(llm) == expected
        assert_idle(llm)
    assert made[0].num_early > 10


@pytest.mark.slow
def test_automatic_lengths_draft_early(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "target", "llama")
    draft = perturbed_copy(folder, tmp_path / "draft", 0.1)
    prompts = [[3, 4, 5], [6, 7]]
    params = SamplingParams(temperature=0, max_tokens=140, ignore_eos=True)
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        expected = outputs(llm, prompts, params)
    made: list[Early] = []
    options = early(draft, made)
    options["speculative_config"]["num_speculative_tokens"] = "auto"
    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **options) as llm:
        runner: Any = llm.engine.runner
        forward = runner.forward

        def slow(*args: Any, **keys: Any) -> Any:
            time.sleep(0.01)  # drafts pay
            return forward(*args, **keys)

        runner.forward = slow
        for _ in range(3):
            assert outputs(llm, prompts, params) == expected
        assert llm.engine.stats.num_accepted_draft_tokens > 10
        assert_idle(llm)
    assert made[0].num_early > 5


def test_a_slot_is_used_again_between_steps(tmp_path: Path) -> None:
    """Speculators hear of the row that was aborted there before they are shown the new one."""
    folder = save_model(tmp_path / "target", "llama")
    made: list[Early] = []
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        expected = outputs(llm, [[6, 7], [8, 9, 10]], GREEDY)
    with LLM(
        folder, skip_tokenizer_init=True, strict=True, memory="64MiB", max_num_seqs=2, **early(folder, made)
    ) as llm:
        engine = llm.engine
        engine.add_request("first", [3, 4, 5], GREEDY)
        (kept,) = engine.add_request("kept", [6, 7], GREEDY)
        for _ in range(3):
            engine.step()
        engine.abort("first")
        (new,) = engine.add_request("new", [8, 9, 10], GREEDY)
        while engine.has_unfinished_requests:
            engine.step()
        assert [kept.output_ids, new.output_ids] == expected
    assert made[0].num_early > 2


def test_sequences_end_at_the_models_limit(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "target", "llama")
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [12] * 20]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    limits: dict[str, Any] = {"max_model_len": 37, "memory": "64MiB", "strict": True, "skip_tokenizer_init": True}
    with LLM(folder, **limits) as llm:
        expected = outputs(llm, prompts, attrs.evolve(params, max_tokens=17))
    made: list[Early] = []
    with LLM(folder, **limits, **early(folder, made)) as llm:
        assert outputs(llm, prompts, attrs.evolve(params, max_tokens=17)) == expected
    assert made[0].num_early > 2


def test_a_row_with_nan_fails_alone(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "target", "llama")
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        expected = outputs(llm, prompts, GREEDY)
    made: list[Early] = []
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", **early(folder, made)) as llm:
        engine: Any = llm.engine
        rows = add(engine, prompts)
        for _ in range(3):
            engine.step()
        match = engine._verification.match

        def broken(requests: Any, offsets: list[int], logits: torch.Tensor, pending: Any) -> torch.Tensor:
            logits = logits.clone()
            logits[offsets[1] : offsets[2]] = float("nan")
            result: torch.Tensor = match(requests, offsets, logits, pending)
            return result

        before = made[0].num_early
        engine._verification.match = broken
        engine.step()
        engine._verification.match = match
        assert made[0].num_early == before + 1
        while engine.has_unfinished_requests:
            engine.step()
        assert "NaN" in str(rows[1].error)
        assert [rows[0].output_ids, rows[2].output_ids] == [expected[0], expected[2]]
        assert rows[1].output_ids == expected[1][: rows[1].num_output_tokens]
        assert_idle(llm)


@pytest.mark.parametrize("fault", ["raises", "list", "rows", "long", "id"])
def test_a_fault_costs_drafts_alone(tmp_path: Path, fault: str) -> None:
    folder = save_model(tmp_path / "target", "llama")
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        expected = outputs(llm, prompts, GREEDY)

    @attrs.define(eq=False)
    class Broken(Early):
        @hookimpl
        def propose(self, batch: ProposalBatch) -> Any:
            proposal = self.inner.propose(batch)
            if not any(row.upcoming is not None for row in batch.rows):
                return proposal
            self.num_early += 1
            tokens, lengths = proposal.tokens, proposal.lengths
            return {
                "raises": lambda: 1 // 0,
                "list": lambda: Proposal(tokens.tolist(), lengths=lengths),
                "rows": lambda: Proposal(tokens[1:], lengths=lengths[1:]),
                "long": lambda: Proposal(torch.cat([tokens, tokens], dim=1)),
                "id": lambda: Proposal(tokens + VOCABULARY, lengths=lengths),
            }[fault]()

    made: list[Early] = []
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", **early(folder, made, kind=Broken)) as llm:
        assert outputs(llm, prompts, GREEDY) == expected
        assert made[0].num_early >= 1
        assert 1 <= sum(llm.engine.faults.values()) <= made[0].num_early  # an id is found out one step late
        assert_idle(llm)


def test_an_interrupted_step_loses_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "target", "llama")
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        expected = outputs(llm, prompts, GREEDY)
    made: list[Early] = []
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", **early(folder, made)) as llm:
        engine: Any = llm.engine
        rows = add(engine, prompts)
        settle = engine.chain.propose_early

        def interrupted(*args: Any) -> Any:
            settle(*args)
            raise KeyboardInterrupt

        def advance(engine: Any) -> None:
            for _ in range(2):  # after a prompt the first step is one in turn
                engine.step()

        for _ in range(4):
            engine.step()
            engine.chain.propose_early = interrupted
            with pytest.raises(KeyboardInterrupt):
                advance(engine)
            engine.chain.propose_early = settle
        while engine.has_unfinished_requests:
            engine.step()
        assert [row.output_ids for row in rows] == expected
        assert_idle(llm)


@pytest.mark.slow
def test_ranks_share_the_target(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "target", "llama")
    draft = perturbed_copy(folder, tmp_path / "draft", 0.03)
    pairs = decisive_prompts(folder, 6, NEW_TOKENS, VOCABULARY)
    made: list[Early] = []
    options: dict[str, Any] = {"strict": True, "memory": "64MiB", "max_num_seqs": 3, "tensor_parallel_size": 2}
    with LLM(folder, skip_tokenizer_init=True, **options, **early(draft, made)) as llm:
        assert outputs(llm, [prompt for prompt, _ in pairs], GREEDY) == [expected for _, expected in pairs]
        assert_idle(llm)
    assert made[0].num_early > 10
