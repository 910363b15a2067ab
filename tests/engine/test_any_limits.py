"""Whatever the limits, prompts and speculator: every request ends with the tokens that plain decoding alone gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from specplug import LLM, SamplingParams
from support.models import VOCABULARY, save_model
from support.speculators import ModelSpeculator, Oracle, TokenSpeculator, TreeSpeculator

LONGEST = 96
GREEDY = SamplingParams(temperature=0, max_tokens=8)
KINDS = ("plain", "ngram", "chain", "tree", "model", "ngram, then tree")


@attrs.frozen
class Case:
    """An engine's limits and what it is asked for."""

    kind: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_draft_tokens: int | None
    block_size: int
    extra_blocks: int
    num_speculative_tokens: int | str
    prompts: list[list[int]]
    params: list[SamplingParams]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(st.integers(1, 9))
    prompt = st.lists(st.integers(3, 6), min_size=1, max_size=draw(st.sampled_from([6, 50])))
    prompts = draw(st.lists(prompt, min_size=1, max_size=2 * rows + 2))
    params = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.0, 0.9]),
        seed=st.integers(0, 3),
        n=st.sampled_from([1, 1, 1, 2, 5]),
        max_tokens=st.integers(1, 24),
        ignore_eos=st.booleans(),
    )
    return Case(
        kind=draw(st.sampled_from(KINDS)),
        max_num_seqs=rows,
        max_num_batched_tokens=rows + draw(st.sampled_from([0, 0, 1, 3, 10, 60])),
        max_num_draft_tokens=draw(st.sampled_from([None, None, 1, 2, 7])),
        block_size=draw(st.sampled_from([1, 2, 5, 16])),
        extra_blocks=draw(st.sampled_from([0, 1, 7, 40, 400])),
        num_speculative_tokens=draw(st.sampled_from(["auto", "auto", 1, 2, 5])),
        prompts=prompts,
        params=draw(st.lists(params, min_size=len(prompts), max_size=len(prompts))),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("target"), "llama")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("draft"), "llama", seed=1)


class Alone:
    """Plain decoding, one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self.llm = start(folder, memory="64MiB")
        self.known: dict[Any, list[int]] = {}

    def __call__(self, prompt: list[int], params: SamplingParams) -> list[list[int]]:
        assert params.seed is not None
        return [self._one(prompt, attrs.evolve(params, n=1, seed=params.seed + i)) for i in range(params.n)]

    def _one(self, prompt: list[int], params: SamplingParams) -> list[int]:
        key = (*prompt, params.temperature, params.seed, params.max_tokens, params.ignore_eos)
        if key not in self.known:
            self.known[key] = self.llm.generate(prompt, params)[0].outputs[0].token_ids
        return self.known[key]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Alone]:
    plain = Alone(folder)
    with plain.llm:
        yield plain


def start(folder: Path, **options: Any) -> LLM:
    return LLM(
        folder,
        skip_tokenizer_init=True,
        check_parity=False,
        compile=False,
        max_model_len=LONGEST,
        strict=True,
        **options,
    )


def speculation(case: Case, small: Path, known: list[list[int]]) -> dict[str, Any]:
    if case.kind == "plain":
        return {}
    oracle = Oracle(known, VOCABULARY, 0.8)
    plugins = {
        "chain": lambda config, target: TokenSpeculator(oracle),
        "tree": lambda config, target: TreeSpeculator(oracle, (1,), 6),
        "model": lambda config, target: ModelSpeculator(target, small, config.num_speculative_tokens),
    }
    config: dict[str, Any] = {}
    for method in reversed(case.kind.split(", then ")):
        keys = {"prompt_lookup_max": 3, "prompt_lookup_min": 1} if method == "ngram" else {}
        fallback = {"fallback": config} if config else {}
        config = {"method": method, "num_speculative_tokens": case.num_speculative_tokens, **keys, **fallback}
    return {"plugins": plugins, "speculative_config": config}


def memory_for(case: Case, folder: Path, options: dict[str, Any]) -> int:
    """Room for one sequence of the longest kind and some blocks more."""
    from specplug.config.engine import EngineConfig
    from specplug.engine.planning import plan_engine

    planned = plan_engine(EngineConfig.create(str(folder), memory="1GiB", max_model_len=LONGEST, **options))
    plan = planned.plan
    planned.facade.close()
    per_block = (plan.target_kv + plan.draft_kv) // plan.num_blocks
    fixed = plan.total_bytes - per_block * plan.num_blocks
    one = -(-(plan.max_model_len + plan.scratch_tokens_per_row) // plan.block_size)
    return fixed + per_block * (one + case.extra_blocks)


def check(case: Case, folder: Path, small: Path, alone: Alone) -> None:
    pairs = list(zip(case.prompts, case.params, strict=True))
    expected = [alone(prompt, params) for prompt, params in pairs]
    known = [prompt + tokens for (prompt, _), own in zip(pairs, expected, strict=True) for tokens in own]
    options = {
        "max_num_seqs": case.max_num_seqs,
        "max_num_batched_tokens": case.max_num_batched_tokens,
        "max_num_draft_tokens": case.max_num_draft_tokens,
        "block_size": case.block_size,
        **speculation(case, small, known),
    }
    with start(folder, memory=memory_for(case, folder, options), **options) as llm:
        forward = llm.engine.runner.forward

        def counted(rows: Any, *args: Any, **keywords: Any) -> Any:
            assert sum(len(row.tokens) for row in rows) <= case.max_num_batched_tokens
            return forward(rows, *args, **keywords)

        llm.engine.runner.forward = counted  # type: ignore[method-assign]
        for _ in range(2):
            outputs = llm.generate(case.prompts, case.params, use_tqdm=False)
            assert [[each.token_ids for each in output.outputs] for output in outputs] == expected
            scheduler = llm.engine.scheduler
            assert not llm.engine.has_unfinished_requests
            assert scheduler.allocator.num_free == scheduler.allocator.num_blocks
            assert len(scheduler._free_slots) == case.max_num_seqs
            assert not any(llm.engine.chain.faults.values())


# Shrinking would start hundreds of engines; cases are small as they are.
ANY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@settings(ANY, max_examples=8)
@given(case=cases())
def test_any_limits_serve_every_request(case: Case, folder: Path, small: Path, alone: Alone) -> None:
    check(case, folder, small, alone)


@pytest.mark.slow
@settings(ANY, max_examples=120)
@given(case=cases())
def test_many_limits_serve_every_request(case: Case, folder: Path, small: Path, alone: Alone) -> None:
    check(case, folder, small, alone)


@pytest.mark.parametrize(
    ("options", "prompts", "params"),
    [
        ({"max_num_seqs": 4, "max_num_batched_tokens": 4}, [[5, 6, 7]] * 6, GREEDY),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 100}, [[5, 6, 7]] * 80, GREEDY),
        ({"max_num_seqs": 4, "max_num_batched_tokens": 4}, [[5, 6, 7]], attrs.evolve(GREEDY, n=6)),
    ],
)
def test_more_rows_than_half_the_tokens_of_a_step(
    folder: Path, options: dict[str, Any], prompts: list[list[int]], params: SamplingParams
) -> None:
    with start(folder, memory="64MiB", **options) as llm:
        outputs = llm.generate(prompts, params)
        tokens = [each.token_ids for output in outputs for each in output.outputs]
        assert len(tokens) == len(prompts) * params.n
        assert tokens == tokens[:1] * len(tokens)
