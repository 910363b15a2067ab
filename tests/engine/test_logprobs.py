"""Log-probabilities equal those of Transformers' raw logits, whatever is drafted, chunked, preempted or forked."""

from __future__ import annotations

import random
from bisect import bisect_right
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from specplug import LLM, SamplingParams
from specplug.model.kv_cache import BlockAllocator
from specplug.outputs import CompletionOutput, RequestOutput
from specplug.sampling.logprobs import PositionLogprobs
from specplug.testing.models import save_words, word
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.reference import load_reference
from support.speculators import ModelSpeculator, Oracle, TokenSpeculator, TreeSpeculator, provide

TOLERANCE = 2e-4
COUNTS = (None, 0, 1, 5, -1, VOCABULARY + 9)
TIGHT = {"max_num_seqs": 4, "max_num_batched_tokens": 11, "block_size": 4, "max_model_len": 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(save_model(tmp_path_factory.mktemp("model"), "qwen2", initializer_range=0.3), VOCABULARY)


@pytest.fixture(scope="module")
def known(folder: Path) -> list[list[int]]:
    """What greedy and seeded requests come to: good drafts."""
    prompts, params = requests()
    with LLM(folder, memory="64MiB", check_parity=False) as llm:
        outputs = llm.generate(prompts, [attrs.evolve(each, logprobs=None, prompt_logprobs=None) for each in params])
    return [each.prompt_token_ids + out.token_ids for each in outputs for out in each.outputs]


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Every pair of counts; greedy and sampled, with and without penalties, one completion and several."""
    choose = random.Random(0)
    prompts, params = [], []
    for index, (count, prompt_count) in enumerate((a, b) for a in COUNTS for b in COUNTS):
        prompts.append([choose.randrange(3, VOCABULARY) for _ in range(choose.choice([1, 2, 7, 16, 30]))])
        params.append(
            SamplingParams(
                logprobs=count,
                prompt_logprobs=prompt_count,
                n=1 + 2 * (index % 3 == 0),
                temperature=index % 2,
                seed=index if index % 4 == 1 else None,
                repetition_penalty=1 + index % 5 / 4,
                max_tokens=3 + index % 10,
                ignore_eos=True,
            )
        )
    return prompts, params


def raw_logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """float32 [len(tokens), V]: Transformers' log-probabilities after each token."""
    with torch.no_grad():
        return load_reference(folder)(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)


def check_position(position: PositionLogprobs, wanted: torch.Tensor, token: int, count: int) -> None:
    assert next(iter(position)) == token
    others = position.keys() - {token}
    asked = VOCABULARY if count == -1 else min(count, VOCABULARY)
    assert len(position) in ({VOCABULARY} if asked == VOCABULARY else {asked, asked + 1})
    least = -float("inf")
    values: list[float] = wanted.tolist()
    rising = sorted(values)
    if 0 < asked < VOCABULARY:
        least = rising[-asked] - TOLERANCE
        assert (len(position) == asked) == (position[token].rank <= asked)
    for each, entry in position.items():
        value = values[each]
        assert abs(entry.logprob - value) <= TOLERANCE
        above = [len(rising) - bisect_right(rising, value + by) for by in (TOLERANCE, -TOLERANCE)]
        assert entry.rank is not None
        assert above[0] < entry.rank <= max(above[1], above[0] + 1)
        assert entry.decoded_token == word(each)
        assert each not in others or value >= least


def check(folder: Path, output: RequestOutput, params: SamplingParams) -> None:
    prompt = output.prompt_token_ids
    if params.prompt_logprobs is None:
        assert output.prompt_logprobs is None
    else:
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        wanted = raw_logprobs(folder, prompt)
        for place, position in enumerate(output.prompt_logprobs[1:], start=1):
            assert position is not None
            check_position(position, wanted[place - 1], prompt[place], params.prompt_logprobs)
    assert len(output.outputs) == params.n
    for completion in output.outputs:
        check_completion(folder, prompt, completion, params)


def check_completion(folder: Path, prompt: list[int], completion: CompletionOutput, params: SamplingParams) -> None:
    assert len(completion.token_ids) == params.max_tokens
    if params.logprobs is None:
        assert completion.logprobs is None
        assert completion.cumulative_logprob is None
        return
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids)
    wanted = raw_logprobs(folder, prompt + completion.token_ids)[len(prompt) - 1 :]
    for position, row, token in zip(completion.logprobs, wanted, completion.token_ids, strict=False):
        check_position(position, row, token, params.logprobs)
    own = [float(row[token]) for row, token in zip(wanted, completion.token_ids, strict=False)]
    assert completion.cumulative_logprob == pytest.approx(sum(own), abs=TOLERANCE * len(own))


@pytest.mark.parametrize("tight", slow_except([False, True], True))
@pytest.mark.parametrize(
    "kind",
    slow_except(["plain", "chain", "tree", "tree with top k", "model"], "plain", "tree with top k", "model"),
)
def test_equal_transformers_log_softmax(folder: Path, known: list[list[int]], kind: str, tight: bool) -> None:
    prompts, params = requests()
    oracle = Oracle(known, VOCABULARY, hit_rate=0.9)
    options: dict[str, Any] = {
        "plain": {},
        "chain": provide(lambda c, t: TokenSpeculator(oracle)),
        "tree": provide(lambda c, t: TreeSpeculator(oracle, (1,), 9)),
        "tree with top k": provide(lambda c, t: TreeSpeculator(oracle, (1,), 9, top_k=2)),
        "model": provide(lambda c, t: ModelSpeculator(t, folder, c.num_speculative_tokens)),
    }[kind]
    with LLM(folder, strict=True, memory="64MiB", check_parity=False, **(TIGHT if tight else {}), **options) as llm:
        if tight:
            llm.engine.scheduler.allocator = BlockAllocator(16)
        outputs = llm.generate(prompts, params)
        assert (llm.engine.scheduler.num_preemptions > 0) == tight
        assert llm.engine.scheduler.allocator.num_free == llm.engine.scheduler.allocator.num_blocks
        accepted = llm.engine.stats.num_accepted_draft_tokens
        assert accepted == 0 if kind == "plain" else accepted > 20
    for output, param in zip(outputs, params, strict=True):
        check(folder, output, param)


@pytest.mark.parametrize("length", [2, 3, 17])
def test_a_batch_whose_every_position_is_scored(folder: Path, length: int) -> None:
    """One prompt alone with prompt_logprobs: the positions are all those of the batch, but in another order."""
    prompt = [3 + 5 * place % 60 for place in range(length)]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1, ignore_eos=True)
    with LLM(folder, memory="32MiB", check_parity=False) as llm:
        output = llm.generate([prompt], params)[0]
    assert output.outputs[0].token_ids == [int(raw_logprobs(folder, prompt)[-1].argmax())]
    check(folder, output, params)


def test_without_a_tokenizer_there_is_no_text(folder: Path) -> None:
    params = SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=1)
    with LLM(folder, skip_tokenizer_init=True, memory="32MiB", check_parity=False) as llm:
        output = llm.generate([[5, 6, 7]], params)[0]
    positions = [*(output.prompt_logprobs or ())[1:], *(output.outputs[0].logprobs or ())]
    assert [entry.decoded_token for position in positions for entry in (position or {}).values()].count(None) >= 4
