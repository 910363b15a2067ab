"""Greedy float32 output equals `transformers` generate, token for token, whatever is proposed and however rows are mixed."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest

from specplug import LLM, SamplingParams
from support.engines import squeeze_blocks
from support.marks import slow_except
from support.models import ARCHITECTURES, BRANCHING, REPRESENTATIVE, VOCABULARY, save_model
from support.reference import decisive_prompts
from support.speculators import ModelSpeculator, Oracle, TokenSpeculator, TreeSpeculator, provide

NEW_TOKENS = 18
ROWS = 8
BLOCKS = 20
SPECULATORS = ("plain", "ngram", "token", "model", "tree")


@functools.cache
def _case(root: Path, architecture: str) -> tuple[Path, Path, list[tuple[list[int], list[int]]]]:
    folder = save_model(root / architecture, architecture)
    draft = save_model(root / f"{architecture}-draft", "llama", seed=1, num_hidden_layers=1)
    return folder, draft, decisive_prompts(folder, ROWS, NEW_TOKENS, VOCABULARY)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def _options(speculator: str, folder: Path, draft: Path, known: list[list[int]]) -> dict[str, Any]:
    if speculator == "plain":
        return {}
    if speculator == "ngram":
        return {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 4,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 1,
            }
        }
    oracle = Oracle(known, VOCABULARY)
    if speculator == "token":
        return provide(lambda config, target: TokenSpeculator(oracle))
    if speculator == "tree":
        return provide(lambda config, target: TreeSpeculator(oracle, (0, 2, 3, "final"), 9, top_k=2))
    return provide(
        lambda config, target: ModelSpeculator(
            target, draft if known[0][0] % 2 else folder, config.num_speculative_tokens
        )
    )


def _cases() -> list[Any]:
    """Not slow: every speculator on the first architecture; on the others a tree, whose masks and states are the hardest."""
    first, *others = REPRESENTATIVE
    kept = [*((first, each) for each in SPECULATORS), *((other, "tree") for other in (*others, *BRANCHING))]
    return slow_except(list(itertools.product((*ARCHITECTURES, *BRANCHING), SPECULATORS)), *kept)


@pytest.mark.parametrize(("architecture", "speculator"), _cases())
def test_equals_transformers_generate(root: Path, architecture: str, speculator: str) -> None:
    folder, draft, pairs = _case(root, architecture)
    known = [prompt + output for prompt, output in pairs]
    options = _options(speculator, folder, draft, known)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **options) as llm:
        alone = [llm.generate([prompt], greedy)[0].outputs[0].token_ids for prompt, _ in pairs[:2]]
        assert alone == [output for _, output in pairs[:2]]
    tight = {
        "max_num_seqs": 5,
        "max_num_batched_tokens": 21,
        "block_size": 4,
        "max_model_len": 72,
        "memory": None,
    }
    with LLM(folder, skip_tokenizer_init=True, strict=True, **{**tight, "memory": "64MiB"}, **options) as llm:
        squeeze_blocks(llm, BLOCKS)
        outputs = llm.generate([prompt for prompt, _ in pairs], greedy)
        assert [output.outputs[0].token_ids for output in outputs] == [output for _, output in pairs]
        assert llm.engine.scheduler.num_preemptions > 0
        assert llm.engine.scheduler.allocator.num_free == BLOCKS
        if speculator in ("token", "tree"):
            assert llm.engine.stats.num_accepted_draft_tokens > 10
        if speculator == "tree":
            assert max(len(output.outputs[0].metrics.acceptance_histogram) for output in outputs) > 2
