"""The draft KV cache holds the committed tokens, each processed once: after any accepts, rejects, naps, forks and restarts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from specplug import LLM, Budget, Outcome, ProposalRow, SamplingParams, TokenView
from specplug_draft_model.sequence import DraftSequence
from support.drafting import (
    ForwardLog,
    SleepyPolicy,
    compare_kv,
    drafted_by,
    perturbed_copy,
    speculator_of,
)
from support.engines import squeeze_blocks
from support.marks import slow_except
from support.models import VOCABULARY, save_model

BLOCKS = 60


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("target"), "qwen3", max_position_embeddings=400, eos_token_id=None)


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed_copy(target, tmp_path_factory.mktemp("draft") / "model", 0.08)


def with_lookup(draft: Path) -> dict[str, Any]:
    """A token speculator first; rows without a match go to the draft model."""
    model = drafted_by(draft)["speculative_config"]
    lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    return {"speculative_config": {**lookup, "fallback": model}}


def workload(llm: LLM, chooser: random.Random, temperatures: tuple[float, ...]) -> None:
    for number in range(13):
        prompt = [chooser.randrange(3, VOCABULARY) for _ in range(chooser.choice([3, 9, 40, 90]))]
        params = SamplingParams(
            temperature=temperatures[number % len(temperatures)],
            max_tokens=chooser.randint(60, 150),
            seed=number if number % 4 == 1 else None,
            n=3 if number % 3 == 0 else 1,
        )
        llm.engine.add_request(str(number), prompt, params)


@pytest.mark.parametrize(
    ("seed", "method", "chain"),
    slow_except(
        [(0, "greedy", "alone"), (1, "probabilistic", "alone"), (2, "greedy", "ngram"), (3, "probabilistic", "ngram")],
        3,
    ),
)
def test_kv_equals_a_fresh_prefill_and_no_token_is_processed_twice(
    target: Path, draft: Path, seed: int, method: str, chain: str
) -> None:
    options = drafted_by(draft) if chain == "alone" else with_lookup(draft)
    own = options["speculative_config"] if chain == "alone" else options["speculative_config"]["fallback"]
    own["draft_sample_method"] = method
    chooser = random.Random(seed)
    with LLM(
        target,
        skip_tokenizer_init=True,
        strict=True,
        max_num_seqs=5,
        max_num_batched_tokens=28,
        block_size=4,
        memory="64MiB",
        chain_verification="standard",  # a rejected token is then never drawn again, as the log takes for granted
        **options,
    ) as llm:
        log = ForwardLog(llm)
        engine = llm.engine
        allocator = squeeze_blocks(llm, BLOCKS)
        engine.chain.policy = policy = SleepyPolicy(seed)
        workload(llm, chooser, (0.0, 1.0, 0.6))
        compared = steps = 0
        while engine.has_unfinished_requests:
            engine.step()
            steps += 1
            if steps % 16 == 0:
                compared += compare_kv(llm, draft)
            if chooser.random() < 0.01 and engine.scheduler.running:
                engine.abort(chooser.choice(engine.scheduler.running).id)
        stats = engine.stats.by_method["draft_model"]
        assert steps > 300
        assert compared > 2000
        assert 100 < stats.num_accepted_draft_tokens < 0.9 * stats.num_draft_tokens
        assert log.reruns > 50
        assert log.forks > 0
        assert policy.naps > 10
        assert engine.scheduler.num_preemptions > 0
        assert max(max(lengths, default=0) for lengths in log.catch_ups.values()) > 8
        assert allocator.num_free == BLOCKS
        if chain == "ngram":
            assert engine.stats.by_method["ngram"].num_accepted_draft_tokens > 20


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_a_step_costs_one_or_two_tokens_of_catch_up(target: Path, draft: Path, method: str) -> None:
    with LLM(
        target,
        skip_tokenizer_init=True,
        strict=True,
        memory="64MiB",
        max_num_batched_tokens=64,
        max_num_seqs=4,
        chain_verification="standard",
        **drafted_by(draft, draft_sample_method=method),
    ) as llm:
        log = ForwardLog(llm)
        prompts = [list(range(3, 3 + length)) for length in (5, 50, 17)]
        params = [SamplingParams(temperature=t, max_tokens=100) for t in (0.0, 1.0, 0.7)]
        llm.generate(prompts, params)
        num_steps = llm.engine.stats.num_steps
    later: list[int] = []
    for prompt, lengths in zip(prompts, log.catch_ups.values(), strict=True):
        chunks = 0
        while sum(lengths[:chunks]) <= len(prompt):
            chunks += 1
        later += lengths[chunks:]
    assert set(later) == {1, 2}
    assert num_steps - 3 >= len(later) > 60


def test_what_a_row_missed_while_asleep_is_caught_up_at_once(target: Path, draft: Path) -> None:
    class Alternating:
        """Twenty steps awake, twenty asleep."""

        calls = 0

        def wish(self, request: Any, speculator: Any) -> int | None:
            self.calls += 1
            return 3 if self.calls // 20 % 2 == 0 else None

    with LLM(target, skip_tokenizer_init=True, strict=True, memory="64MiB", max_num_seqs=1, **drafted_by(draft)) as llm:
        log = ForwardLog(llm)
        llm.engine.chain.policy = Alternating()
        llm.engine.add_request("0", [5, 6, 7], SamplingParams(temperature=0, max_tokens=150))
        while llm.engine.has_unfinished_requests:
            llm.engine.step()
            compare_kv(llm, draft)
    (lengths,) = log.catch_ups.values()
    assert set(lengths[1:]) - {1, 2} in ({20}, {21}, {22}, {20, 21}, {21, 22}, {20, 21, 22})


@pytest.mark.parametrize(
    ("outcome", "stored"),
    [
        (Outcome("draft_model", 4, (0, 1, 2, 3)), 13),  # the last draft token was never run
        (Outcome("draft_model", 4, (0, 1)), 12),
        (Outcome("draft_model", 4, ()), 10),
        (Outcome("ngram", 4, (0, 1)), 10),
        (None, 10),
    ],
)
def test_only_ones_own_accepted_drafts_are_kept(outcome: Outcome | None, stored: int) -> None:
    sequence = DraftSequence(num_stored=10, num_speculative=3)
    row = ProposalRow(0, False, TokenView([1] * 12), range(10, 11), Budget(0, 0), SamplingParams(), outcome=outcome)
    for _ in range(2):
        sequence.settle(row, "draft_model")
        assert sequence == DraftSequence(num_stored=stored, num_speculative=0)


def test_rows_that_ended_are_forgotten(target: Path, draft: Path) -> None:
    with LLM(target, skip_tokenizer_init=True, strict=True, memory="64MiB", **drafted_by(draft)) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=8)
        llm.generate([[3, 4, 5]] * 6, greedy)
        llm.generate([[3, 4, 5]], greedy)
        assert len(speculator_of(llm)._sequences) <= 1
