"""With the prefix cache every output is what it is without it, whatever drafts, forks, is preempted, chunked or evicted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from specplug import LLM, RequestError, SamplingParams
from specplug.request import Request
from support.drafting import options_of, perturbed_copy
from support.engines import assert_idle, squeeze_blocks
from support.heads import save_eagle3
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.speculators import ModelSpeculator, provide

SPECULATORS = ("plain", "ngram", "draft_model", "eagle3", "eagle3 tree", "old model", "tree")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    target = save_model(root / "target", "llama", max_position_embeddings=400, eos_token_id=None, intermediate_size=64)
    return {
        "target": target,
        "draft": perturbed_copy(target, root / "draft", 0.05),
        "head": save_eagle3(root / "head"),
    }


def drafting_of(speculator: str, models: dict[str, Path]) -> dict[str, Any]:
    if speculator == "old model":  # knows nothing of the prefix cache
        return provide(lambda c, t: ModelSpeculator(t, models["draft"], c.num_speculative_tokens))
    return options_of(speculator, models)


@contextmanager
def engine(models: dict[str, Path], speculator: str = "plain", **options: Any) -> Iterator[LLM]:
    common: dict[str, Any] = {"skip_tokenizer_init": True, "strict": True, "check_parity": False, "memory": "64MiB"}
    with LLM(models["target"], **{**common, **drafting_of(speculator, models), **options}) as llm:
        yield llm
        assert_idle(llm)
        allocator = llm.engine.scheduler.allocator
        assert len(allocator.cached) == allocator.cached.num_idle
        assert not any(allocator._references)


def texts(seed: int, count: int, longest: int = 60) -> list[list[int]]:
    """Prompts that share beginnings of all lengths."""
    chooser = random.Random(seed)
    trunks = [[chooser.randrange(3, VOCABULARY) for _ in range(longest)] for _ in range(2)]
    return [
        [
            *chooser.choice(trunks)[: chooser.choice([0, 4, 16, 17, 32, longest])],
            *(chooser.randrange(3, VOCABULARY) for _ in range(chooser.randint(1, 9))),
        ]
        for _ in range(count)
    ]


def params_of(seed: int, count: int) -> list[SamplingParams]:
    chooser = random.Random(seed)
    return [
        SamplingParams(
            temperature=chooser.choice([0.0, 0.9]), seed=number, n=chooser.choice([1, 1, 2]), max_tokens=14, top_p=0.9
        )
        for number in range(count)
    ]


def outputs(llm: LLM, prompts: list[Any], params: Any) -> list[list[list[int]]]:
    return [[o.token_ids for o in out.outputs] for out in llm.generate(prompts, params, use_tqdm=False)]


@attrs.frozen
class Chats:
    """Requests, and what they and their next turns give without a cache."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    expected: list[list[list[int]]]
    turns: list[list[int]]
    continued: list[list[list[int]]]


@pytest.fixture(scope="module")
def chats(models: dict[str, Path]) -> Chats:
    prompts, params = texts(1, 14), params_of(2, 14)
    with engine(models, enable_prefix_caching=False) as plain:
        expected = outputs(plain, prompts, params)
        turns = [[*prompt, *answers[0], 9, 8, 7] for prompt, answers in zip(prompts, expected, strict=True)]
        return Chats(prompts, params, expected, turns, outputs(plain, turns, params))


@pytest.mark.parametrize("block_size", slow_except([4, 1, 3, 16], 4))
@pytest.mark.parametrize("speculator", slow_except(SPECULATORS, "plain", "draft_model", "eagle3 tree", "tree"))
def test_output_is_the_same_with_and_without(
    models: dict[str, Path], chats: Chats, speculator: str, block_size: int
) -> None:
    """Greedy and seeded requests, some forked, in a tight engine: chunks, preemption, eviction. Twice, and as chats."""
    tight = {"max_num_seqs": 5, "max_num_batched_tokens": 41, "block_size": block_size, "max_model_len": 140}
    with engine(models, speculator, **tight) as llm:
        squeeze_blocks(llm, -(-156 // block_size))
        assert outputs(llm, chats.prompts, chats.params) == chats.expected
        assert outputs(llm, chats.turns, chats.params) == chats.continued
        assert outputs(llm, chats.prompts[::-1], chats.params[::-1]) == chats.expected[::-1]
        cache = llm.engine.prefix_cache
        assert cache is not None
        assert cache.num_queried_tokens > cache.num_hit_tokens > 300
        assert llm.engine.scheduler.num_preemptions > 0


def cached_kv(llm: LLM, tokens: list[int]) -> tuple[int, list[torch.Tensor]]:
    """The target's cached keys and values of some tokens, of all layers."""
    (request,) = llm.engine.make_request("look", [*tokens, 5], SamplingParams(max_tokens=1))
    assert llm.engine.prefix_cache is not None
    blocks = llm.engine.prefix_cache.find(request, llm.engine.scheduler.allocator).blocks
    size = llm.engine.plan.block_size
    slots = torch.tensor([block * size + i for block in blocks for i in range(size)], dtype=torch.long)
    cache = llm.engine.runner.cache
    return len(slots), [tensor[:, slots].clone() for tensor in (*cache.keys, *cache.values)]


@pytest.mark.parametrize("dtype", slow_except(["float32", "bfloat16"], "float32"))
def test_cached_kv_is_bit_for_bit_that_of_a_fresh_prefill(models: dict[str, Path], dtype: str) -> None:
    """Written by chunks, by decoding, and by the verification of chains of drafts."""
    params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
    prompt = texts(3, 1)[0]
    with engine(models, "draft_model", dtype=dtype, max_num_batched_tokens=33) as llm:
        (out,) = llm.generate([prompt], params)
        tokens = prompt + out.outputs[0].token_ids
        count, stored = cached_kv(llm, tokens)
        assert count == (len(tokens) - 1) // 16 * 16
        assert llm.engine.stats.num_accepted_draft_tokens > 10
        llm.reset_prefix_cache()
        assert cached_kv(llm, tokens)[0] == 0
    with engine(models, dtype=dtype) as fresh:
        fresh.generate([tokens], SamplingParams(max_tokens=1))
        again, computed = cached_kv(fresh, tokens[:count])
    assert again == count
    for one, other in zip(stored, computed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "speculator", slow_except(["draft_model", "eagle3", "eagle3 tree"], "draft_model", "eagle3 tree")
)
def test_drafts_after_a_cached_prefix_are_as_good_as_without(models: dict[str, Path], speculator: str) -> None:
    """The speculator's own KV is cached: the same number of drafts is verified and accepted, step for step."""
    prompts = texts(5, 6 if speculator == "eagle3" else 3, longest=90)  # a head without training is rarely accepted
    prompts.append([*prompts[0][:32], 11])
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    histograms = []
    for caching in (False, True):
        with engine(models, speculator, enable_prefix_caching=caching, block_size=4) as llm:
            seen = []
            for prompt in prompts:  # one after the other, each and its next turn
                for _ in range(2):
                    (out,) = llm.generate([prompt], params, use_tqdm=False)
                    seen.append((out.outputs[0].token_ids, out.outputs[0].metrics.acceptance_histogram))
                    prompt = [*prompt, *out.outputs[0].token_ids, 4, 5]
            histograms.append(seen)
            if caching:
                assert llm.engine.prefix_cache is not None
                assert llm.engine.prefix_cache.num_hit_tokens > 100
    assert histograms[0] == histograms[1]
    assert sum(sum(histogram[1:]) for _, histogram in histograms[0]) > 0


def test_a_draft_model_that_slept_is_shown_what_it_missed(models: dict[str, Path]) -> None:
    """Blocks without the draft's KV: a later row starts where that ends, and writes it."""
    prompt = texts(6, 1, longest=80)[0] + list(range(3, 60))
    quiet = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, num_speculative_tokens=0)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with engine(models, "draft_model", enable_prefix_caching=False) as llm:
        expected = llm.generate([prompt], greedy)[0].outputs[0]
    with engine(models, "draft_model") as llm:
        llm.generate([prompt], quiet)
        for hit in range(2):
            (out,) = llm.generate([prompt], greedy)
            assert out.num_cached_tokens == (len(prompt) - 1) // 16 * 16
            assert out.outputs[0].token_ids == expected.token_ids
            assert out.outputs[0].metrics.acceptance_histogram == expected.metrics.acceptance_histogram, hit


def test_a_head_that_slept_starts_where_its_states_do(models: dict[str, Path]) -> None:
    prompt = texts(6, 1, longest=80)[0] + list(range(3, 60)) + list(range(3, 40))
    quiet = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, num_speculative_tokens=0)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    starts: list[tuple[int, int]] = []
    with engine(models, "eagle3") as llm:
        (speculator,) = llm.engine.chain.speculators
        inner = speculator.propose

        def propose(batch: Any) -> Any:
            starts.extend((row.new_positions.start, row.num_cached_tokens) for row in batch.rows if row.is_new)
            return inner(batch=batch)

        speculator.propose = propose
        plain = llm.generate([prompt], quiet)[0].outputs[0].token_ids
        (out,) = llm.generate([prompt], greedy)
        assert out.outputs[0].token_ids[:4] == plain
        assert out.num_cached_tokens == (len(prompt) - 1) // 16 * 16
    assert starts == [(out.num_cached_tokens, 0)]


def test_salts_never_share_a_block(models: dict[str, Path]) -> None:
    prompt = texts(8, 1, longest=70)[0] + list(range(3, 40))
    greedy = SamplingParams(temperature=0, max_tokens=3)
    with engine(models) as llm:
        held: dict[str | None, set[int]] = {}
        for salt in (None, "a", "b", "a", None):
            (request,) = llm.engine.add_request(f"{salt}", prompt, greedy, cache_salt=salt)
            llm.engine.step()
            assert request.table is not None
            blocks = set(request.table.blocks[: (len(prompt) - 1) // 16])
            assert (request.num_cached_tokens or 0) == (16 * len(blocks) if salt in held else 0)
            assert held.setdefault(salt, blocks) == blocks
            while llm.engine.has_unfinished_requests:
                llm.engine.step()
        assert not held[None] & held["a"]
        assert not held["a"] & held["b"]
        hits = [
            llm.generate({"prompt_token_ids": prompt, "cache_salt": salt}, greedy)[0].num_cached_tokens
            for salt in ("a", "c")
        ]
        assert hits == [(len(prompt) - 1) // 16 * 16, 0]
        for wrong in ("", 5, "\ud800"):
            with pytest.raises(RequestError, match="cache_salt"):
                llm.generate({"prompt_token_ids": prompt, "cache_salt": wrong}, greedy)
            with pytest.raises(RequestError, match="request 'x': cache_salt"):
                llm.engine.add_request("x", prompt, greedy, cache_salt=wrong)  # type: ignore[arg-type]


def test_counters_and_outputs(models: dict[str, Path]) -> None:
    prompt = list(range(3, 53))
    params = SamplingParams(temperature=0, max_tokens=4, n=3, logprobs=2)
    with engine(models) as llm:
        first, second = (llm.generate([prompt], params)[0] for _ in range(2))
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)
        assert [out.token_ids for out in first.outputs] == [out.token_ids for out in second.outputs]
        for one, other in zip(first.outputs, second.outputs, strict=True):
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)
        values = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        assert values["vllm:prefix_cache_queries"] == 100
        assert values["vllm:prefix_cache_hits"] == 48
        assert values["vllm:kv_cache_usage_perc"] == 0
    with engine(models, enable_prefix_caching=False) as llm:
        assert [llm.generate([prompt], params)[0].num_cached_tokens for _ in range(2)] == [0, 0]
        assert llm.engine.prefix_cache is None
        assert len(llm.engine.scheduler.allocator.cached) == 0


def test_prompt_log_probabilities_are_those_without_a_cache(models: dict[str, Path]) -> None:
    prompt = list(range(3, 53))
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2)
    with engine(models, max_num_batched_tokens=32) as llm:
        llm.generate([prompt], SamplingParams(max_tokens=1))
        scored = llm.generate([prompt], params)[0]
        assert scored.num_cached_tokens == 0
        assert scored.prompt_logprobs is not None
        assert len(scored.prompt_logprobs) == len(prompt)
    with engine(models, enable_prefix_caching=False) as llm:
        assert llm.generate([prompt], params)[0].prompt_logprobs == scored.prompt_logprobs


def test_a_failed_request_leaves_nothing_in_the_cache(models: dict[str, Path]) -> None:
    """Its blocks are cleared, so none of them may be found; those that another row holds stay."""
    prompt = list(range(3, 53))
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with engine(models) as llm:
        expected = llm.generate([prompt], greedy)[0].outputs[0].token_ids
        llm.reset_prefix_cache()
        (request,) = llm.engine.add_request("fails", prompt, greedy)
        llm.engine.step()
        fail_at_next_commit(request)
        llm.engine.step()
        assert request.error is not None
        assert len(llm.engine.scheduler.allocator.cached) == 0
        out = llm.generate([prompt], greedy)[0]
        assert (out.num_cached_tokens, out.outputs[0].token_ids) == (0, expected)


def fail_at_next_commit(request: Request) -> None:
    class Broken:
        def push(self, token: int, *, may_stop: bool) -> bool:
            raise ValueError("cannot decode")

        def finish(self) -> None:
            pass

    request.text = Broken()  # type: ignore[assignment]


def test_an_interrupted_step_leaves_only_committed_blocks(models: dict[str, Path]) -> None:
    prompt = list(range(3, 53))
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with engine(models, enable_prefix_caching=False) as llm:
        expected = llm.generate([prompt], greedy)[0].outputs[0].token_ids
    with engine(models) as llm:
        forward, calls = llm.engine.runner.forward, 0

        def interrupted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            result = forward(*arguments, **options)
            if calls % 3 == 2:
                raise KeyboardInterrupt
            return result

        llm.engine.runner.forward = interrupted  # type: ignore[method-assign]
        (request,) = llm.engine.add_request("r", prompt, greedy)
        while llm.engine.has_unfinished_requests:
            try:
                llm.engine.step()
            except KeyboardInterrupt:
                continue
        assert request.output_ids == expected
        assert llm.engine.scheduler.num_preemptions > 3
