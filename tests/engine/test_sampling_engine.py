"""Sampling through the whole engine: the exact joint of three tokens, and seeded requests that never change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specplug import LLM, SamplingParams, process
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.reference import load_reference
from support.speculators import ModelSpeculator, Oracle, TokenSpeculator, TreeSpeculator, provide
from support.statistics import THRESHOLD, worst_p_value

V = 16
PROMPT = [3, 7, 5, 11]
REQUESTS = 10_000
FEWER_REQUESTS = 2_000
"""Whether rows, drafts and verdicts belong together; `test_lossless_rules` sees a bias of one percent in the rule itself."""
SAMPLING = SamplingParams(temperature=0.7, top_k=9, top_p=0.95, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("sixteen"), "llama", vocab_size=V, initializer_range=0.25, eos_token_id=None
    )


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("draft"), "gpt_neox", seed=9, vocab_size=V, num_hidden_layers=1)


@pytest.fixture(scope="module")
def joint(folder: Path) -> np.ndarray:
    """Exact [V, V, V] probabilities of the first three tokens, by Transformers' own logits."""
    model = load_reference(folder)
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    batch = torch.cat([torch.tensor([PROMPT]).expand(V * V, -1), pairs], dim=1)
    with torch.no_grad():
        logits = model(batch).logits[:, len(PROMPT) - 1 :]
    first, second, third = (
        process(logits[:, position].double().float(), [SAMPLING] * V * V).double() for position in range(3)
    )
    a, b = pairs[:, 0], pairs[:, 1]
    prefix = first[0][a] * second[torch.arange(V * V), b]
    return (prefix[:, None] * third).view(V, V, V).numpy()


def speculators(folder: Path, draft_folder: Path) -> dict[str, dict[str, Any]]:
    adversary = Oracle([], V, seed=1)
    return {
        "plain": {},
        "token": provide(lambda c, t: TokenSpeculator(adversary)),
        "tree": provide(lambda c, t: TreeSpeculator(adversary, (1,), 6)),
        "model": provide(lambda c, t: ModelSpeculator(t, draft_folder, c.num_speculative_tokens), gamma=3),
        "mixed": {
            "plugins": {
                "token": lambda c, t: TokenSpeculator(adversary),
                "model": lambda c, t: ModelSpeculator(t, draft_folder, c.num_speculative_tokens),
            },
            "speculative_config": {
                "method": "token",
                "num_speculative_tokens": 2,
                "fallback": {"method": "model", "num_speculative_tokens": 3},
            },
        },
    }


@pytest.mark.parametrize(
    ("name", "rule", "requests"),
    slow_except(
        [
            ("model", "standard", FEWER_REQUESTS),
            ("mixed", "block", FEWER_REQUESTS),
            ("plain", "block", REQUESTS),
            ("token", "block", REQUESTS),
            ("tree", "block", REQUESTS),
            ("model", "block", REQUESTS),
        ],
        ("model", "standard", FEWER_REQUESTS),
        ("mixed", "block", FEWER_REQUESTS),
    ),
)
def test_joint_of_three_tokens(
    folder: Path, draft_folder: Path, joint: np.ndarray, name: str, rule: str, requests: int
) -> None:
    options = speculators(folder, draft_folder)[name]
    with LLM(
        folder,
        skip_tokenizer_init=True,
        strict=True,
        max_num_seqs=250,
        max_num_batched_tokens=3000,
        memory="256MiB",
        chain_verification=rule,
        **options,
    ) as llm:
        outputs = llm.generate([PROMPT] * requests, SAMPLING)
        if name != "plain":
            assert 0 < llm.engine.stats.num_accepted_draft_tokens < llm.engine.stats.num_draft_tokens
    samples = np.array([output.outputs[0].token_ids[:3] for output in outputs])
    assert worst_p_value(samples, joint) > THRESHOLD


@pytest.mark.parametrize(("trials", "every"), [(200_000, 100), (2_000, 33), (800, 20)])
def test_planted_bias_is_seen(folder: Path, joint: np.ndarray, trials: int, every: int) -> None:
    """One wrong token in 1 % of the vectorised verifier's trials, 3 % of 2,000 requests, or 5 % of 800."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(V**3, size=trials, p=joint.ravel() / joint.sum())
    samples = np.stack([drawn // V**2, drawn // V % V, drawn % V], axis=1)
    assert worst_p_value(samples, joint) > THRESHOLD
    samples[::every, 2] = 3
    assert worst_p_value(samples, joint) < THRESHOLD


def test_a_seeded_request_never_changes(tmp_path: Path) -> None:
    """Alone, in any batch, in any order, with any speculator, after preemption: the same tokens."""
    folder = save_model(tmp_path / "target", "qwen2", initializer_range=0.2)
    draft = save_model(tmp_path / "draft", "llama", seed=3)
    prompts = [[3 + i, 40 - i, *range(5, 5 + 3 * i)] for i in range(7)]
    params = [SamplingParams(temperature=0.9, top_p=0.9, seed=100 + i, max_tokens=20) for i in range(7)]
    known: list[list[int]] = []
    oracle = Oracle(known, VOCABULARY, seed=2)

    def run(order: list[int], **options: Any) -> tuple[dict[int, list[int]], LLM]:
        with LLM(
            folder, skip_tokenizer_init=True, strict=True, **{"memory": "64MiB", "block_size": 4, **options}
        ) as llm:
            if options.get("max_num_seqs") == 3:
                from specplug.model.kv_cache import BlockAllocator

                llm.engine.scheduler.allocator = BlockAllocator(18)
            outputs = llm.generate([prompts[i] for i in order], [params[i] for i in order])
            return {i: out.outputs[0].token_ids for i, out in zip(order, outputs, strict=True)}, llm

    alone: dict[int, list[int]] = {}
    for i in range(7):
        alone |= run([i])[0]
    known.extend(prompts[i] + alone[i] for i in range(7))
    assert len({tuple(tokens) for tokens in alone.values()}) == 7
    forward, backward = list(range(7)), list(reversed(range(7)))
    assert run(forward)[0] == alone
    assert run(backward)[0] == alone
    tight, llm = run(backward, max_num_seqs=3, max_num_batched_tokens=16)
    assert tight == alone
    assert llm.engine.scheduler.num_preemptions > 0
    for make in (
        lambda c, t: TokenSpeculator(oracle),
        lambda c, t: TreeSpeculator(oracle, (0, 3), 8),
        lambda c, t: ModelSpeculator(t, draft, 4),
        lambda c, t: ModelSpeculator(t, folder, 4),
    ):
        result, llm = run(forward, **provide(make))
        assert result == alone
        assert llm.engine.stats.num_draft_tokens > 0
    mixed = [*params[:3], *(SamplingParams(temperature=1.0, max_tokens=9) for _ in range(4))]
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", **provide(lambda c, t: TokenSpeculator(oracle))) as llm:
        outputs = llm.generate(prompts, mixed)
    assert {i: outputs[i].outputs[0].token_ids for i in range(3)} == {i: alone[i] for i in range(3)}
