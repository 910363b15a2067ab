"""Rows that early drafts must not lose track of: prompts as long as a step, rows that sleep, end at once, or fail."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import specplug_eagle
from specplug import LLM, ProposalBatch, SamplingParams, hookimpl
from specplug.speculation.chain import SpeculatorChain
from specplug.speculation.draft_length import FixedDraftLength
from specplug.speculation.link import ChainLink
from support.early import Early, early, outputs, treat_cpu_as_gpu
from support.engines import assert_idle
from support.models import save_model

HEAD = str(Path(specplug_eagle.__file__).parent / "tiny")
TINY: dict[str, Any] = {"dtype": "float32", "memory": "256MiB", "max_model_len": 256, "max_num_seqs": 4}
TEXTS = ["def smallest(values, limit):\n    return ", "def add_all(values, limit):\n    "]


@pytest.fixture(autouse=True, params=[False, True], ids=["python", "staged"])
def ahead(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    treat_cpu_as_gpu(monkeypatch, staged=request.param)


def forever(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def sleeping(monkeypatch: pytest.MonkeyPatch, turns: range, woken: int | None = None) -> None:
    """In these calls of `plan` the first row sleeps; in one of them it is only brought up to date."""
    count = iter(range(1000))

    def plan(self: Any, speculator: Any, requests: Any, seen: Any, has_all_states: Any) -> Any:
        turn = next(count)
        lengths = [self.length_of(request, speculator) for request in requests]
        if turn in turns and len(lengths) > 1:
            lengths[0] = 0 if turn == woken else None
        return lengths

    monkeypatch.setattr(FixedDraftLength, "plan", plan)


def test_a_row_that_ends_with_its_first_token(tmp_path: Path) -> None:
    """It has a prompt of new states and no budget."""
    made: list[Early] = []
    with LLM("tiny", strict=True, **TINY, **early(HEAD, made, load=specplug_eagle.load_speculator)) as llm:
        for params in ([forever(1)] * 2, [forever(1), forever(12)]):
            llm.generate(TEXTS, params)
        assert made[0].num_early > 2
        assert_idle(llm)


def test_a_row_that_sleeps_is_given_what_it_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping(monkeypatch, range(5, 9))
    folder = save_model(tmp_path / "target", "llama")
    made: list[Early] = []
    spans: list[range] = []

    @attrs.define(eq=False)
    class Watching(Early):
        @hookimpl
        def propose(self, batch: ProposalBatch) -> Any:
            spans.extend(row.new_positions for row in batch.rows if row.row_id == 0)
            return Early.propose(self, batch)

    with LLM(
        folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **early(folder, made, kind=Watching)
    ) as llm:
        outputs(llm, [[3, 4, 5], [6, 7]], forever(40))
    assert max(len(span) for span in spans[1:]) > 4  # what it missed at once
    assert all(after.start <= before.stop for before, after in itertools.pairwise(spans))
    assert made[0].num_early > 5


def test_a_row_that_slept_is_only_brought_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping(monkeypatch, range(3, 100), woken=20)
    made: list[Early] = []
    with LLM("tiny", strict=True, **TINY, **early(HEAD, made, load=specplug_eagle.load_speculator)) as llm:
        llm.generate(TEXTS, forever(60))
        assert made[0].num_early > 20


def test_a_row_whose_text_cannot_be_decoded_fails_alone() -> None:
    """It fails after its forward has been launched, and before that is verified."""

    class Broken:
        def __init__(self, text: Any) -> None:
            self.text = text

        def __getattr__(self, name: str) -> Any:
            return getattr(self.text, name)

        def take(self, count: int) -> list[str]:
            raise RuntimeError("tokenizer")

    made: list[Early] = []
    with LLM("tiny", strict=True, **TINY, **early(HEAD, made, load=specplug_eagle.load_speculator)) as llm:
        engine: Any = llm.engine
        ids = llm.get_tokenizer().encode(TEXTS[0])
        rows = [engine.add_request(str(number), ids[: 8 + number], forever(20))[0] for number in range(3)]
        for _ in range(4):
            engine.step()
        rows[1].text = Broken(rows[1].text)
        while engine.has_unfinished_requests:
            engine.step()
        assert "tokenizer" in rows[1].error
        assert [row.num_output_tokens for row in (rows[0], rows[2])] == [20, 20]
        assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("length", [63, 64])
def test_a_prompt_as_long_as_a_step(tmp_path: Path, length: int) -> None:
    """With its next token it is longer than what a loop runs; what is stored of it for other rows is right."""
    folder = save_model(tmp_path / "target", "llama")
    made: list[Early] = []
    limits: dict[str, Any] = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "max_model_len": 160, "block_size": 8}
    prompt = [3 + (7 * place + length) % 50 for place in range(length)]
    accepted = []
    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **limits, **early(folder, made)) as llm:
        for _ in range(2):  # the second time with a hit of the prefix cache
            before = llm.engine.stats.num_accepted_draft_tokens
            outputs(llm, [prompt], forever(40))
            accepted.append(llm.engine.stats.num_accepted_draft_tokens - before)
    assert min(accepted) > 20
    assert made[0].num_early > 10


def test_a_draft_that_is_dropped_has_no_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a full step drops it; the next call must not take an older draft's result for its."""
    folder = save_model(tmp_path / "target", "llama")
    made: list[Early] = []
    stored: list[tuple[int, int]] = []
    calls = iter(range(1000))
    in_turn = [False]
    plan, propose = SpeculatorChain.plan_early, SpeculatorChain.propose

    @attrs.define(eq=False)
    class Watching(Early):
        @hookimpl
        def propose(self, batch: ProposalBatch) -> Any:
            proposal = Early.propose(self, batch)
            sequences = self.inner._sequences
            stored.extend((len(r.tokens), sequences[r.row_id].num_stored) for r in batch.rows if r.upcoming is None)
            return proposal

    def dropping(self: Any, requests: Any, reserve: Any, contended: Any, early: Any = None) -> None:
        propose(self, requests, reserve, contended, early)
        if early is not None and next(calls) == 5:
            in_turn[0] = True
            for request in requests:
                request.draft = None

    def planned(self: Any, requests: Any) -> Any:
        is_next, in_turn[0] = in_turn[0], False
        return None if is_next else plan(self, requests)

    monkeypatch.setattr(SpeculatorChain, "propose", dropping)
    monkeypatch.setattr(SpeculatorChain, "plan_early", planned)
    with LLM(
        folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **early(folder, made, kind=Watching)
    ) as llm:
        outputs(llm, [[3, 4, 5]], forever(50))
    assert len(stored) >= 1
    assert all(count <= length for length, count in stored)


def test_a_batch_that_cannot_be_made_costs_drafts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "target", "llama")
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        expected = outputs(llm, [[3, 4, 5]], forever(20))
    made: list[Early] = []
    make = ChainLink.make_batch
    failures = []

    def broken(self: Any, *args: Any, **keys: Any) -> Any:
        if keys.get("upcoming") is not None and not failures:
            failures.append(1)
            raise torch.OutOfMemoryError("too little memory")
        return make(self, *args, **keys)

    monkeypatch.setattr(ChainLink, "make_batch", broken)
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", **early(folder, made)) as llm:
        assert outputs(llm, [[3, 4, 5]], forever(20)) == expected
        assert failures
        assert sum(llm.engine.faults.values()) == 1
