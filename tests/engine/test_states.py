"""Rows that sleep, wake, fork, are aborted and preempted never mix states: all of them equal a fresh prefill."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, SamplingParams
from specplug.speculation.draft_length import FixedDraftLength
from specplug.speculation.target_states.ring_buffer import WINDOW
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.reference import generate, load_reference
from support.speculators import ModelSpeculator, Oracle, TreeSpeculator, provide

BOUNDARIES = (0, 1, 3, "final")


class RandomPolicy(FixedDraftLength):
    """Lets rows sleep for a while, wakes them, and varies their budgets."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.asleep: dict[int, int] = {}
        self.asked: dict[int, int] = {}

    def length_of(self, request: Any, speculator: Any) -> int | None:
        self.asked[request.number] = self.asked.get(request.number, 0) + 1
        if request.number % 2 and self.asked[request.number] == 4:
            self.asleep[request.number] = WINDOW + 5  # longer than states are kept
        left = self.asleep.get(request.number, 0)
        if left:
            self.asleep[request.number] = left - 1
            return None
        if self.random.random() < 0.06:
            self.asleep[request.number] = self.random.choice([1, 3, 10])
        return self.random.randint(0, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen3", max_position_embeddings=400, eos_token_id=None)


def fresh_states(folder: Path, tokens: list[int]) -> dict[Any, torch.Tensor]:
    """Every boundary's states by Transformers alone."""
    model = load_reference(folder)
    last_layer: list[torch.Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda m, a, out: last_layer.append(out))
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    hook.remove()
    count = len(model.model.layers)
    states: dict[Any, torch.Tensor] = {b: out.hidden_states[b][0] for b in range(count)}
    states[count] = last_layer[0][0] if last_layer[0].dim() == 3 else last_layer[0]
    states["final"] = out.hidden_states[-1][0]
    states["top_ids"] = out.logits[0].topk(2).indices
    return states


@pytest.mark.parametrize("seed", slow_except([0, 1], 0))
def test_delivered_states_equal_a_fresh_prefill(folder: Path, seed: int) -> None:
    oracle = Oracle([], VOCABULARY, seed=seed)
    speculator = TreeSpeculator(oracle, BOUNDARIES, 7, top_k=2)
    chooser = random.Random(seed)
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 40, "block_size": 4, "memory": "64MiB"}
    with LLM(folder, skip_tokenizer_init=True, strict=True, **options, **provide(lambda c, t: speculator)) as llm:
        engine = llm.engine
        engine.chain.policy = RandomPolicy(seed)
        from specplug.model.kv_cache import BlockAllocator

        engine.scheduler.allocator = BlockAllocator(66)
        for number in range(9):
            prompt = [chooser.randrange(3, VOCABULARY) for _ in range(chooser.randint(3, 90))]
            params = SamplingParams(
                temperature=number % 2, max_tokens=chooser.randint(20, 150), seed=number, n=chooser.choice([1, 1, 3])
            )
            oracle.known.append(prompt + generate(folder, prompt, 150)[0])
            engine.add_request(str(number), prompt, params)
        steps = 0
        while engine.has_unfinished_requests:
            engine.step()
            steps += 1
            if chooser.random() < 0.01:
                alive = list(engine.scheduler.requests())
                if alive:
                    engine.abort(chooser.choice(alive).id)
        assert steps > 100
        assert engine.stats.num_accepted_draft_tokens > 30
        engine.add_request("last", [3, 4], SamplingParams(temperature=0, max_tokens=2))  # delivers the last `ended`
        while engine.has_unfinished_requests:
            engine.step()
        assert engine.scheduler.num_preemptions > 0
        assert engine.scheduler.allocator.num_free == 66
    assert len(speculator.histories) >= 9
    gaps = 0
    compared = 0
    for tokens, channels in speculator.histories:
        expected = fresh_states(folder, tokens)
        for channel, states in channels.items():
            positions = sorted(states)
            gaps += sum(b - a > 1 for a, b in pairwise(positions))
            for position in positions:
                if channel == "top_ids":
                    assert set(states[position].tolist()) & set(expected[channel][position].tolist())
                else:
                    torch.testing.assert_close(
                        states[position].cpu(), expected[channel][position], atol=3e-4, rtol=1e-3
                    )
                compared += 1
    assert compared > 2000
    assert gaps > 0, "no row slept longer than states are kept: the test lost its point"


def test_kv_after_many_roll_backs_equals_a_fresh_prefill(folder: Path) -> None:
    """Target and draft KV, hundreds of random accepts and rejects in trees and chains, rows joining and leaving."""
    known: list[list[int]] = []
    chooser = random.Random(5)
    prompts = [[chooser.randrange(3, VOCABULARY) for _ in range(chooser.randint(2, 60))] for _ in range(6)]
    known = [prompt + generate(folder, prompt, 120)[0] for prompt in prompts]
    speculators: list[Any] = []

    def make_tree(config: Any, target: Any) -> Any:
        return TreeSpeculator(Oracle(known, VOCABULARY), (1,), 9)

    def make_model(config: Any, target: Any) -> Any:
        speculators.append(ModelSpeculator(target, folder, 4))
        return speculators[0]

    options = {
        "plugins": {"tree": make_tree, "model": make_model},
        "speculative_config": {
            "method": "tree",
            "num_speculative_tokens": 5,
            "fallback": {"method": "model", "num_speculative_tokens": 4},
        },
    }
    model = load_reference(folder)
    checked = 0
    with LLM(
        folder,
        skip_tokenizer_init=True,
        strict=True,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        memory="64MiB",
        **options,
    ) as llm:
        engine = llm.engine
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), prompt, SamplingParams(temperature=0, max_tokens=120))
        draft_cache = engine._shared_caches[1]
        steps = 0
        while engine.has_unfinished_requests:
            engine.step()
            steps += 1
            if steps % 20:
                continue
            for request in engine.scheduler.running:
                with torch.no_grad():
                    past = model(torch.tensor([request.tokens]), use_cache=True).past_key_values
                assert request.table is not None
                seen = speculators[0].seen.get(request.slot, 0)
                for cache, count in (
                    (engine.runner.cache, request.num_computed),
                    (draft_cache, min(seen, request.num_computed)),
                ):
                    slots = torch.tensor(list(request.table.slots(0, count)), dtype=torch.long)
                    for layer, stored in enumerate(past.layers):
                        torch.testing.assert_close(
                            cache.keys[layer].cpu()[:, slots], stored.keys[0, :, :count], atol=3e-4, rtol=1e-3
                        )
                        torch.testing.assert_close(
                            cache.values[layer].cpu()[:, slots], stored.values[0, :, :count], atol=3e-4, rtol=1e-3
                        )
                        checked += count
        assert engine.stats.num_accepted_draft_tokens > 100
        assert engine.stats.num_accepted_draft_tokens < engine.stats.num_draft_tokens
    assert checked > 1000


def test_forked_completions_equal_separate_requests(folder: Path) -> None:
    prompt = [5, 9, 11, 40, 23, 8, 7, 6, 5, 4, 30]
    with LLM(folder, skip_tokenizer_init=True, block_size=4, memory="64MiB") as llm:
        family = llm.generate([prompt], SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=24))[0]
        alone = [
            llm.generate([prompt], SamplingParams(temperature=1.0, seed=11 + i, max_tokens=24))[0].outputs[0]
            for i in range(3)
        ]
        assert [o.token_ids for o in family.outputs] == [o.token_ids for o in alone]
        assert len({tuple(o.token_ids) for o in family.outputs}) == 3
        allocator = llm.engine.scheduler.allocator
        assert allocator.num_free == allocator.num_blocks
