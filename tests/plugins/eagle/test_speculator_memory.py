"""Heads in the memory plan and in chains of speculators: planned from headers, allocated as planned, nothing held twice."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, SamplingParams
from specplug.config.engine import EngineConfig
from specplug.engine.planning import PlannedEngine, plan_engine
from specplug.model.load import checkpoint, pickled
from specplug.speculation.draft_length import FixedDraftLength
from support.heads import TREES, drafted_by_head, head_speculator_of, save_eagle1, save_eagle3
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.peak import PeakBytes, tensor_bytes
from support.reference import decisive_prompts

WIDE, MANY = 64, 2048
BUDGET = 16 << 20  # a GPU's activations and logits take most of it
SIZES: dict[str, Any] = {"memory": BUDGET, "max_num_seqs": 4, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    save_model(root / "target", "llama", hidden_size=WIDE, vocab_size=MANY)
    save_model(root / "small", "llama")
    sizes: dict[str, Any] = {"vocabulary": MANY, "hidden_size": WIDE, "target_hidden_size": WIDE}
    save_eagle1(root / "one", vocabulary=MANY, hidden=WIDE)
    save_eagle3(root / "three", draft_vocab=700, **sizes)
    save_eagle3(root / "borrowing", has_own_lm_head=False, **sizes)
    save_eagle3(root / "own", has_own_embedding=True, num_layers=2, **sizes)
    save_eagle3(root / "reduced", draft_vocab=40)
    return root


CASES = [
    ("one", "eagle", "authors"),
    ("three", "eagle3", "chain"),
    ("borrowing", "eagle3", "odd"),
    ("own", "eagle3", "dynamic"),
]


def plan(root: Path, head: str, method: str, tree: str, **options: Any) -> PlannedEngine:
    options |= drafted_by_head(root / head, method=method, **TREES[tree])
    return plan_engine(EngineConfig.create(str(root / "target"), **SIZES, **options))


def passing_bytes(planned: PlannedEngine) -> int:
    """What is planned for the peak of drafting; of it only the vocabulary map lives between steps."""
    (region,) = (region for region in planned.regions[0] if region.kind == "buffers")
    return region.fixed_bytes


@pytest.mark.parametrize(("head", "method", "tree"), slow_except(CASES, CASES[-1]))
def test_planned_and_allocated_differ_by_less_than_two_percent(root: Path, head: str, method: str, tree: str) -> None:
    """A copy of the target's embedding or output layer, or of the head, would be more than that."""
    planned = plan(root, head, method, tree)
    lasting = planned.plan.total_bytes - planned.plan.step_bytes - passing_bytes(planned)
    before = tensor_bytes()
    options: dict[str, Any] = {"skip_tokenizer_init": True, "check_parity": False}
    llm = LLM(
        root / "target", strict=True, **options, **SIZES, **drafted_by_head(root / head, method=method, **TREES[tree])
    )
    assert llm.engine.plan == planned.plan
    assert planned.plan.total_bytes <= BUDGET
    assert tensor_bytes() - before == pytest.approx(lasting, rel=0.02)
    speculator = head_speculator_of(llm)
    params = [SamplingParams(temperature=t, max_tokens=20, ignore_eos=True) for t in (0.0, 1.0)] * 2
    llm.generate([[3, 4, 5]] * 4, params)
    assert llm.engine.stats.num_draft_tokens > 50
    assert tensor_bytes() - before == pytest.approx(lasting, rel=0.03), "something is left behind"
    llm.generate([[3, 4]], SamplingParams(temperature=0, max_tokens=3))  # delivers the last `ended`
    assert set(speculator._sequences) <= {0}
    llm.close()
    del llm, speculator
    assert tensor_bytes() - before < planned.plan.total_bytes * 0.01, "something is left behind after close"


@pytest.mark.parametrize(("head", "method", "tree"), CASES)
def test_the_plan_is_made_of_headers_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, head: str, method: str, tree: str
) -> None:
    def fail(*args: Any, **keys: Any) -> None:
        pytest.fail("a tensor was read")

    monkeypatch.setattr("safetensors.safe_open", fail)
    monkeypatch.setattr(torch, "load", fail)
    for module in (checkpoint, pickled):
        for name in ("safe_open", "load_file", "load_tensors"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr("specplug.plugins.lazy_weights.load_tensors", fail)
    planned = plan(root, head, method, tree)
    weights, cache, _ = planned.regions[0]
    stored = sum(
        torch.Size(entry["shape"]).numel() * 4
        for name, entry in json.loads(header_of(root / head / "model.safetensors")).items()
        if name not in ("__metadata__", "d2t", "t2d")
    )
    maps = 8 * 700 + MANY if head == "three" else 0
    assert weights.fixed_bytes == stored + maps
    kv_width = 2 * 16 if head == "one" else 2 * 8
    assert cache.bytes_per_token == (2 if head == "own" else 1) * 2 * kv_width * 4
    assert cache.scratch_tokens_per_row >= planned.speculators[0].traits.max_nodes
    assert planned.plan.draft_weights == weights.fixed_bytes


@pytest.mark.parametrize("tree", [{}, TREES["authors"], {"tree_depth": 3}], ids=["chain", "static", "dynamic"])
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_the_peak_of_drafting_is_planned(tmp_path: Path, tree: dict[str, Any], method: str) -> None:
    """A vocabulary so wide that nothing else counts; all rows draft with every truncation."""
    vocabulary, rows = 4096, 8
    wide = save_model(tmp_path / "wide", "llama", vocab_size=vocabulary, num_hidden_layers=1, initializer_range=0.1)
    head = save_eagle3(tmp_path / "head", vocabulary=vocabulary, boundaries=(0, 1))
    options = drafted_by_head(head, draft_sample_method=method, **tree)
    options |= {"memory": "256MiB", "max_num_seqs": rows, "max_num_batched_tokens": 230}
    planned = passing_bytes(plan_engine(EngineConfig.create(str(wide), **options)))
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, min_p=0.001, max_tokens=6)
    with LLM(wide, skip_tokenizer_init=True, strict=True, check_parity=False, **options) as llm:
        runner, (registered,) = head_speculator_of(llm)._runner, llm.engine.chain.speculators
        assert runner is not None
        cache = runner.cache
        counter = PeakBytes([*runner.head.parameters(), *runner.head.buffers(), *cache.keys, *cache.values])
        propose = registered.propose

        def counted(batch: Any) -> Any:
            with counter:
                return propose(batch=batch)

        registered.propose = counted
        llm.generate([[3 + row, 4, 5] for row in range(rows)], params)
    assert 0.6 * planned < counter.peak < 1.02 * planned


def header_of(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


@pytest.mark.parametrize("tree", ["chain", "dynamic"])
def test_a_fallback_behind_ngram_keeps_its_place(root: Path, tree: str) -> None:
    """Rows that ngram drafts for, that sleep, and that have nothing to look up, mixed: the head drafts for what is left."""
    folder = root / "small"
    pairs = decisive_prompts(folder, 8, 40, VOCABULARY)

    class Sleepy(FixedDraftLength):
        def __init__(self) -> None:
            self.random = random.Random(1)

        def length_of(self, request: Any, speculator: Any) -> int | None:
            return None if self.random.random() < 0.15 else 4

    options: dict[str, Any] = {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 2,
            "fallback": {
                "method": "eagle3",
                "model": str(root / "reduced"),
                "num_speculative_tokens": 4,
                **TREES[tree],
            },
        }
    }
    sizes = {"max_num_seqs": 5, "max_num_batched_tokens": 60, "block_size": 4, "memory": "32MiB"}
    with LLM(folder, skip_tokenizer_init=True, strict=True, check_parity=False, **sizes, **options) as llm:
        llm.engine.chain.policy = Sleepy()
        outputs = llm.generate([prompt for prompt, _ in pairs], SamplingParams(temperature=0, max_tokens=40))
        assert [output.outputs[0].token_ids for output in outputs] == [output for _, output in pairs]
        counts = llm.engine.stats.by_method
        assert counts["ngram"].num_draft_tokens > 15
        assert counts["eagle3"].num_draft_tokens > 100


def test_two_heads_in_one_chain(root: Path) -> None:
    """An EAGLE-1 head behind an EAGLE-3 head: both caches are planned, and forks share both."""
    folder = root / "small"
    one = save_eagle1(root / "small-one")
    pairs = decisive_prompts(folder, 4, 20, VOCABULARY)

    class Alternating(FixedDraftLength):
        def length_of(self, request: Any, speculator: Any) -> int | None:
            return (
                3 if (request.number + request.num_output_tokens // 5) % 2 == (speculator.method == "eagle") else None
            )

    options: dict[str, Any] = {
        "speculative_config": {
            "method": "eagle3",
            "model": str(root / "reduced"),
            "num_speculative_tokens": 3,
            "fallback": {"method": "eagle", "model": str(one), "num_speculative_tokens": 3, **TREES["authors"]},
        }
    }
    with LLM(folder, skip_tokenizer_init=True, strict=True, check_parity=False, memory="32MiB", **options) as llm:
        llm.engine.chain.policy = Alternating()
        params = SamplingParams(temperature=0, max_tokens=20, n=2)
        outputs = llm.generate([prompt for prompt, _ in pairs], params)
        for output, (_, expected) in zip(outputs, pairs, strict=True):
            assert [completion.token_ids for completion in output.outputs] == [expected] * 2
        assert {method for method, count in llm.engine.stats.by_method.items() if count.num_draft_tokens > 20} == {
            "eagle",
            "eagle3",
        }
        assert len(llm.engine._shared_caches) == 3
