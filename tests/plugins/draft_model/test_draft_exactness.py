"""Greedy float32 output equals `transformers` generate, token for token, whatever model drafts and however rows are mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specplug import LLM, SamplingParams
from support.drafting import drafted_by, perturbed_copy, recorded
from support.engines import squeeze_blocks
from support.marks import slow_except
from support.models import ARCHITECTURES, REPRESENTATIVE, VOCABULARY, save_model
from support.reference import decisive_prompts

NEW_TOKENS = 16
ROWS = 8
BLOCKS = 14
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
TIGHT: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 21, "block_size": 4, "max_model_len": 72}
DRAFTS = ("llama", "gpt2", "qwen3", "opt", "gemma2", "gpt_neox", "deepseek_v3", "mistral")
PAIRS = [
    (target, next(draft for draft in (*DRAFTS[index % 8 :], *DRAFTS) if draft != target))
    for index, target in enumerate(ARCHITECTURES)
]


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("drafts")
    return {name: save_model(root / name, name, seed=1) for name in DRAFTS}


@pytest.mark.parametrize(("target", "draft"), slow_except(PAIRS, *REPRESENTATIVE))
def test_equals_transformers_generate(tmp_path: Path, drafts: dict[str, Path], target: str, draft: str) -> None:
    folder = save_model(tmp_path / "target", target)
    pairs = decisive_prompts(folder, ROWS, NEW_TOKENS, VOCABULARY)
    prompts, expected = [prompt for prompt, _ in pairs], [output for _, output in pairs]
    common: dict[str, Any] = {"skip_tokenizer_init": True, "strict": True, "memory": "64MiB"}
    foreign = drafts[draft]

    greedy = drafted_by(foreign, draft_sample_method="greedy")
    with LLM(folder, **common, **greedy) as llm:
        assert [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in prompts[:2]] == expected[:2]
        assert llm.engine.stats.num_draft_tokens > 0

    sampled = drafted_by(foreign, draft_sample_method="probabilistic")
    with LLM(folder, **common, **TIGHT, check_parity=False, **sampled) as llm:
        squeeze_blocks(llm, BLOCKS)
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)] == expected
        preemptions = llm.engine.scheduler.num_preemptions
        assert llm.engine.stats.num_draft_tokens > 0

    own = drafted_by(perturbed_copy(folder, tmp_path / "perturbed", 0.02))
    with LLM(folder, **common, **TIGHT, check_parity=False, **own) as llm:
        allocator = squeeze_blocks(llm, BLOCKS)
        assert generate_with_aborts(llm, prompts) == expected
        assert preemptions + llm.engine.scheduler.num_preemptions > 0
        assert llm.engine.stats.num_accepted_draft_tokens > 10
        assert allocator.num_free == BLOCKS


def generate_with_aborts(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Outputs of the prompts, among requests that are aborted as soon as they have a draft."""
    engine = llm.engine
    kept = []
    for number, prompt in enumerate(prompts):
        if number in (1, 4):
            engine.add_request(f"aborted {number}", prompt[::-1], GREEDY)
        kept += engine.add_request(str(number), prompt, GREEDY)
    aborted = set()
    while engine.has_unfinished_requests:
        engine.step()
        for request in list(engine.scheduler.running):
            if request.id.startswith("aborted") and request.draft is not None:
                engine.abort(request.id)
                aborted.add(request.id)
    assert len(aborted) == 2
    return [request.output_ids for request in kept]


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_drafting_without_looking_in_between_gives_the_same_drafts(tmp_path: Path, threshold: float) -> None:
    """As on a GPU; rows are chunked and preempted, so that some have many new tokens and some end at once."""
    folder = save_model(tmp_path / "target", "llama")
    draft = perturbed_copy(folder, tmp_path / "draft", 0.03)
    prompts = [prompt for prompt, _ in decisive_prompts(folder, ROWS, NEW_TOKENS, VOCABULARY)]
    found = []
    for loops in (False, True):
        options, made = recorded(draft, loops=loops, draft_sample_method="greedy", draft_confidence_threshold=threshold)
        with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **TIGHT, **options) as llm:
            squeeze_blocks(llm, BLOCKS)
            outputs = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
            assert llm.engine.scheduler.num_preemptions > 0
        found.append((outputs, [(tokens, drafted) for tokens, drafted, _ in made[0].proposals]))
    assert found[0] == found[1]
    assert len(found[0][1]) > ROWS
