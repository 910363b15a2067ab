"""Greedy float32 output with EAGLE heads equals `transformers` generate, token for token, on every architecture."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
from recorded_drafts import paths_of

from specplug import (
    LLM,
    MemoryBudget,
    MemoryRegion,
    Proposal,
    ProposalBatch,
    Resources,
    SamplingParams,
    hookimpl,
    native,
)
from specplug.model.kv_cache import BlockAllocator
from specplug_eagle import EagleSpeculator, load_speculator
from support.heads import TREES, drafted_by_head, save_eagle1, save_eagle3
from support.marks import slow_except
from support.models import ARCHITECTURES, REPRESENTATIVE, VOCABULARY, save_model
from support.reference import decisive_prompts

NEW_TOKENS = 14
ROWS = 8
BLOCKS = {"chain": 13, "odd": 13, "dynamic": 13, "authors": 16}
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


class Helped:
    """Drafts with the plugin, and mostly writes what will really come on one path of the draft."""

    def __init__(self, inner: EagleSpeculator, known: list[list[int]]) -> None:
        self.inner = inner
        self.traits = inner.traits
        self.known = known
        self.random = random.Random(0)

    @hookimpl
    def plan_memory(self, budget: MemoryBudget) -> list[MemoryRegion]:
        return self.inner.plan_memory(budget)

    @hookimpl
    def warmup(self, resources: Resources) -> None:
        self.inner.warmup(resources)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        proposal = self.inner.propose(batch)
        assert proposal.parents is not None
        for row, tokens, parents in zip(batch.rows, proposal.tokens, proposal.parents, strict=True):
            coming = next((k[len(row.tokens) :] for k in self.known if k[: len(row.tokens)] == list(row.tokens)), [])
            if len(tokens) and self.random.random() < 0.8:
                own = list(range(-1, len(tokens) - 1)) if parents is None else list(parents)
                node = self.random.randrange(len(tokens))
                depths = [len(path) for path in paths_of(tokens, parents)]
                while node >= 0:
                    if depths[node] <= len(coming):
                        tokens[node] = coming[depths[node] - 1]
                    node = own[node]
        return proposal


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@functools.cache
def _target(root: Path, architecture: str) -> tuple[Path, list[tuple[list[int], list[int]]]]:
    folder = save_model(root / architecture, architecture)
    return folder, decisive_prompts(folder, ROWS, NEW_TOKENS, VOCABULARY)


@functools.cache
def _head(root: Path, kind: str) -> Path:
    if kind == "EAGLE-1":
        return save_eagle1(root / kind)
    return save_eagle3(root / kind, draft_vocab=40) if kind == "reduced" else save_eagle3(root / kind)


def check(root: Path, architecture: str, kind: str, tree: str, **extra: Any) -> None:
    folder, pairs = _target(root, architecture)
    prompts, expected = [prompt for prompt, _ in pairs], [output for _, output in pairs]
    method, keys = "eagle" if kind == "EAGLE-1" else "eagle3", TREES[tree]
    common: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "strict": True,
        "check_parity": False,
        "memory": "64MiB",
        **extra,
    }
    with LLM(folder, **common, **drafted_by_head(_head(root, kind), method=method, **keys)) as llm:
        assert [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in prompts[:1]] == expected[:1]
        assert llm.engine.stats.num_draft_tokens > 4
    known = [prompt + output for prompt, output in pairs]
    options: dict[str, Any] = {
        "plugins": {"helped": lambda config, target: Helped(load_speculator(config, target), known)},
        "speculative_config": {
            "method": "helped",
            "model": str(_head(root, kind)),
            "num_speculative_tokens": 4,
            **keys,
        },
    }
    tokens = 60 if tree == "authors" else 30
    tight = {"max_num_seqs": 5, "max_num_batched_tokens": tokens, "block_size": 4, "max_model_len": 80}
    with LLM(folder, **common, **tight, **options) as llm:
        llm.engine.scheduler.allocator = BlockAllocator(BLOCKS[tree])
        outputs = llm.generate(prompts, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert llm.engine.scheduler.num_preemptions > 0
        assert llm.engine.scheduler.allocator.num_free == BLOCKS[tree]
        assert 4 < llm.engine.stats.num_accepted_draft_tokens < llm.engine.stats.num_draft_tokens
        assert max(len(output.outputs[0].metrics.acceptance_histogram) for output in outputs) > 2


def _cases() -> list[Any]:
    """Not slow: three heads on the first architecture; on the others a dynamic tree, which needs most of a target."""
    heads = [("reduced", "chain"), ("EAGLE-1", "authors"), ("reduced", "dynamic")]
    first, *others = REPRESENTATIVE
    kept = [*((first, *head) for head in heads), *((other, "reduced", "dynamic") for other in others)]
    return slow_except([(target, *head) for target in ARCHITECTURES for head in heads], *kept)


@pytest.mark.parametrize(("architecture", "kind", "tree"), _cases())
def test_equals_transformers_generate(root: Path, architecture: str, kind: str, tree: str) -> None:
    check(root, architecture, kind, tree)


@pytest.mark.parametrize(
    ("kind", "tree"),
    [("EAGLE-1", "chain"), ("EAGLE-1", "dynamic"), ("EAGLE-3", "chain"), ("EAGLE-3", "odd"), ("EAGLE-3", "dynamic")],
)
@pytest.mark.parametrize("architecture", slow_except(["llama", "gemma2"], "llama"))
def test_every_head_and_tree_equals_transformers_generate(root: Path, architecture: str, kind: str, tree: str) -> None:
    check(root, architecture, kind, tree)


@pytest.mark.slow
def test_compiled_heads_and_targets_draft_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    native.load()  # from the usual cache: a new one holds no kernels
    monkeypatch.setenv("SPECPLUG_CACHE", str(tmp_path))
    check(root, "llama", "reduced", "dynamic", compile=True)
    assert len(list((tmp_path / "forwards").glob("*.bin"))) == 2
    assert "uncompiled" not in caplog.text
    assert "without CUDA graphs" not in caplog.text


@pytest.mark.parametrize("tree", ["chain", "authors", "dynamic"])
def test_a_seeded_request_is_that_of_plain_decoding(root: Path, tree: str) -> None:
    folder, pairs = _target(root, "llama")
    prompts = [prompt for prompt, _ in pairs]
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, seed=seed, max_tokens=NEW_TOKENS) for seed in range(len(prompts))
    ]
    common: dict[str, Any] = {"skip_tokenizer_init": True, "strict": True, "check_parity": False, "memory": "64MiB"}
    with LLM(folder, **common) as llm:
        alone = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    head = _head(root, "reduced")
    for sample in ("greedy", "probabilistic"):
        options = drafted_by_head(head, draft_sample_method=sample, **TREES[tree])
        with LLM(folder, **common, **options) as llm:
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == alone
            assert llm.engine.stats.num_draft_tokens > 50
