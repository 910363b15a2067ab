"""Sampled output keeps the target's distribution, and what is reported of drafts is what they were drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from specplug import LLM, BlockTable, Budget, ProposalBatch, ProposalRow, SamplingParams, TokenView
from specplug.testing.models import save_words
from support.heads import drafted_by_head, head_speculator_of, save_eagle1, save_eagle3
from support.marks import slow_except
from support.models import save_model
from support.statistics import THRESHOLD, p_value, worst_p_value
from support.stepwise import Stepwise

V = 16
DRAFT_V = 11
PROMPT = [3, 7, 5, 7, 7, 3]
COMMON: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True, "detokenize": False}
PARAMS = {
    "temperature": SamplingParams(temperature=0.7, **COMMON),
    "top-p": SamplingParams(temperature=1.2, top_p=0.85, **COMMON),
    "top-k": SamplingParams(temperature=1.1, top_k=6, **COMMON),
    "min-p": SamplingParams(temperature=1.0, min_p=0.08, **COMMON),
    "penalties": SamplingParams(
        temperature=0.9, repetition_penalty=1.4, presence_penalty=0.8, frequency_penalty=-1.5, **COMMON
    ),
}
TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (0, 0, 1)]
SAMPLED = {"draft_sample_method": "probabilistic"}
DYNAMIC = {"tree_depth": 2, "tree_top_k": 3, "tree_total_tokens": 9}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Stepwise:
    folder = tmp_path_factory.mktemp("sixteen")
    save_model(folder, "llama", vocab_size=V, num_hidden_layers=1, initializer_range=0.2, eos_token_id=None)
    return Stepwise(save_words(folder, V))


@pytest.fixture(scope="module")
def joints(reference: Stepwise) -> dict[str, np.ndarray]:
    return {name: reference.joint_of_three(PROMPT, params) for name, params in PARAMS.items()}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("heads")
    return {
        "EAGLE-1": save_eagle1(root / "one", vocabulary=V, deviation=0.15),
        "EAGLE-3": save_eagle3(root / "three", vocabulary=V, boundaries=(0, 1), deviation=0.2),
        "reduced": save_eagle3(root / "reduced", vocabulary=V, draft_vocab=DRAFT_V, boundaries=(0, 1), deviation=0.2),
    }


def engine(reference: Stepwise, head: Path, **options: Any) -> LLM:
    sizes: dict[str, Any] = {"max_num_seqs": 500, "max_num_batched_tokens": 6000, "memory": "512MiB"}
    method = "eagle" if head.name == "one" else "eagle3"
    sizes |= {key: options.pop(key) for key in ("max_model_len", "block_size") if key in options}
    return LLM(
        reference.folder, strict=True, check_parity=False, **sizes, **drafted_by_head(head, 3, method, **options)
    )


@pytest.mark.parametrize(
    ("head", "tested", "options", "times"),
    slow_except(
        [
            ("EAGLE-3", ("temperature", "top-p"), {}, 1800),
            ("reduced", ("top-k", "min-p"), SAMPLED, 1800),
            ("EAGLE-1", ("penalties", "top-p"), {"speculative_token_tree": TREE}, 1800),
            ("EAGLE-3", ("temperature", "penalties"), {"speculative_token_tree": TREE, **SAMPLED}, 1800),
            ("reduced", ("top-p", "top-k"), {"speculative_token_tree": TREE, **SAMPLED}, 1800),
            ("reduced", ("min-p", "temperature"), DYNAMIC, 1800),
            ("EAGLE-3", ("temperature", "penalties"), {"speculative_token_tree": TREE, **SAMPLED}, 800),
            ("reduced", ("min-p", "temperature"), DYNAMIC, 800),
        ],
        ("EAGLE-3", ("temperature", "penalties"), {"speculative_token_tree": TREE, **SAMPLED}, 800),
        ("reduced", ("min-p", "temperature"), DYNAMIC, 800),
    ),
    ids=[
        "chain",
        "sampled chain",
        "tree",
        "sampled tree",
        "sampled reduced tree",
        "dynamic",
        "sampled tree, fewer",
        "dynamic, fewer",
    ],
)
def test_joint_of_three_tokens(
    reference: Stepwise,
    joints: dict[str, np.ndarray],
    heads: dict[str, Path],
    head: str,
    tested: tuple[str, str],
    options: dict[str, Any],
    times: int,
) -> None:
    """Different sampling parameters side by side in the same batches; rows with less room draft less."""
    names = list(tested) * times
    params = [
        attrs.evolve(PARAMS[name], num_speculative_tokens=(None, 5, 2)[number % 3]) for number, name in enumerate(names)
    ]
    with engine(reference, heads[head], **options) as llm:
        outputs = llm.generate([PROMPT] * len(params), params)
        stats = llm.engine.stats
        assert len(names) / 10 < stats.num_accepted_draft_tokens < 0.9 * stats.num_draft_tokens
    samples = np.array([output.outputs[0].token_ids[:3] for output in outputs])
    for place, name in enumerate(tested):
        assert worst_p_value(samples[place::2], joints[name]) > THRESHOLD, name


def rows_of(llm: LLM, count: int, sampling: SamplingParams, seed: int, budget: Budget) -> list[ProposalRow]:
    """New rows that all hold the same prompt, each in blocks and with a random stream of its own."""
    rows = []
    for index in range(count):
        table = BlockTable(llm.engine.plan.block_size)
        table.extend([index])
        generator = torch.Generator().manual_seed(seed * count + index)
        rows.append(
            ProposalRow(
                row_id=index,
                is_new=True,
                tokens=TokenView(PROMPT),
                new_positions=range(len(PROMPT) - 1),
                new_states=slice(index * (len(PROMPT) - 1), (index + 1) * (len(PROMPT) - 1)),
                budget=budget,
                sampling=sampling,
                table=table,
                generator=lambda generator=generator: generator,
            )
        )
    return rows


@pytest.mark.parametrize("which", slow_except(["EAGLE-3", "reduced"], "reduced"))
def test_drafted_siblings_are_drawn_from_what_is_reported(
    reference: Stepwise, heads: dict[str, Path], which: str
) -> None:
    """Ordered siblings of the root, and of its first child: the first ~ q, the second ~ q without the first, and so on."""
    sampling = SamplingParams(temperature=0.8, top_p=0.97)
    options = {"speculative_token_tree": TREE, "draft_sample_method": "probabilistic"}
    ordered = np.zeros((V, V, V))
    below = np.zeros((V, V, V))
    reports: dict[int, np.ndarray] = {}
    generator = torch.Generator().manual_seed(0)
    drafts = 0
    with engine(reference, heads[which], max_model_len=32, block_size=32, **options) as llm:
        speculator = head_speculator_of(llm)
        states = torch.randn(len(PROMPT) - 1, 32, generator=generator).repeat(400, 1)
        hidden = dict.fromkeys(speculator.traits.hidden_states, states.to(llm.engine.runner.device))
        for seed in range(20):
            rows = rows_of(llm, 400, sampling, seed, Budget(len(TREE), 3))
            proposal = speculator.propose(ProposalBatch(rows, hidden_states=hidden))
            assert proposal.probs is not None
            assert proposal.parents is not None
            for tokens, parents, probs in zip(proposal.tokens, proposal.parents, proposal.probs, strict=True):
                assert probs is not None
                assert parents is not None
                assert probs.index is not None
                drafts += 1
                ids = list(range(V)) if probs.token_ids is None else probs.token_ids.tolist()
                top = [node for node, parent in enumerate(parents) if parent == -1]
                assert [probs.index[node] for node in top] == [0, 0, 0]
                ordered[tuple(tokens[node] for node in top)] += 1
                for node, parent in enumerate(parents):
                    if parent == -1 or parents[parent] != -1:
                        continue
                    token, values = tokens[parent], np.zeros(V)
                    values[ids] = probs.values[probs.index[node]].cpu().numpy()
                    assert np.allclose(reports.setdefault(token, values), values, atol=1e-5)
                first = [node for node, parent in enumerate(parents) if parent == 0]
                below[tokens[0], tokens[first[0]], tokens[first[1]]] += 1
                if -1 not in reports:
                    reports[-1] = np.zeros(V)
                    reports[-1][ids] = probs.values[0].cpu().numpy()
    assert drafts == 8000
    q = reports[-1]
    expected = np.zeros((V, V, V))
    for a, b, c in np.ndindex(V, V, V):
        if len({a, b, c}) == 3 and q[a] and q[b] and q[c]:
            expected[a, b, c] = q[a] * q[b] / (1 - q[a]) * q[c] / (1 - q[a] - q[b])
    assert p_value(ordered, expected) > THRESHOLD
    expected = np.zeros((V, V, V))
    for a, b, c in np.ndindex(V, V, V):
        if q[a] and b != c:
            own = reports[a]
            expected[a, b, c] = q[a] * own[b] * own[c] / (1 - own[b])
    assert p_value(below, expected) > THRESHOLD


@pytest.mark.parametrize("shape", ["sampled", "likeliest"])
def test_only_what_can_use_it_is_sampled(reference: Stepwise, heads: dict[str, Path], shape: str) -> None:
    """A greedy or seeded row takes the likeliest tokens, reported as such, beside rows that are sampled."""
    options: dict[str, Any] = {"speculative_token_tree": TREE}
    if shape == "sampled":
        options["draft_sample_method"] = "probabilistic"
    kinds = [SamplingParams(temperature=0), SamplingParams(seed=3), SamplingParams(temperature=1.0)] * 2
    with engine(reference, heads["reduced"], max_model_len=32, block_size=32, **options) as llm:
        speculator = head_speculator_of(llm)
        rows = rows_of(llm, 6, SamplingParams(), 0, Budget(len(TREE), 3))
        for row, params in zip(rows, kinds, strict=True):
            row.sampling = params
        states = torch.randn(len(PROMPT) - 1, 32, generator=torch.Generator().manual_seed(0)).repeat(6, 1)
        hidden = dict.fromkeys(speculator.traits.hidden_states, states.to(llm.engine.runner.device))
        proposal = speculator.propose(ProposalBatch(rows, hidden_states=hidden))
    assert proposal.probs is not None
    assert proposal.scores is not None
    sampled = [params.temperature > 0 and params.seed is None and shape == "sampled" for params in kinds]
    assert [probs is not None for probs in proposal.probs] == sampled
    assert [scores is None for scores in proposal.scores] == sampled
    likeliest = [list(tokens) for tokens, drawn in zip(proposal.tokens, sampled, strict=True) if not drawn]
    assert all(tokens == likeliest[0] for tokens in likeliest)
