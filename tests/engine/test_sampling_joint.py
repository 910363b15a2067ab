"""Sampling parameters and drafts: the distribution after every node, and the exact joint of three tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specplug import LLM, SamplingParams
from specplug.sampling.distributions import DistributionRow, StepDistributions
from specplug.sampling.rules import LogitsRules
from specplug.testing.models import save_words, word
from support.marks import slow_except
from support.models import save_model
from support.speculators import ModelSpeculator, Oracle, TokenSpeculator, TreeSpeculator, provide
from support.statistics import THRESHOLD, worst_p_value
from support.stepwise import Stepwise, distributions, ruled_scores

V = 16
PROMPT = [3, 7, 5, 7, 7, 3]
REQUESTS = 2_000
FEWER_REQUESTS = 800
COMMON: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True, "detokenize": False}
PARAMS = {
    "penalties": SamplingParams(
        temperature=0.8, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=-1.8, **COMMON
    ),
    "truncation": SamplingParams(temperature=1.3, min_p=0.03, top_k=9, top_p=0.9, **COMMON),
    "bias, allowed, min_tokens": SamplingParams(
        temperature=0.9,
        logit_bias={3: 1.5, 5: -1.0, 9: 2.0},
        allowed_token_ids=[1, 3, 5, 7, 8, 9, 12],
        min_tokens=2,
        stop_token_ids=[9, 12],
        **COMMON,
    ),
    "bad words": SamplingParams(
        bad_words=[word(4), f"{word(3)} {word(6)}", f"{word(10)} {word(10)}", f"{word(3)} {word(10)} {word(11)}"],
        logit_bias={3: 1.0, 6: 1.5, 10: 3.0, 11: 2.5},
        **COMMON,
    ),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Stepwise:
    folder = save_model(
        tmp_path_factory.mktemp("sixteen"),
        "llama",
        vocab_size=V,
        num_hidden_layers=1,
        initializer_range=0.2,
        eos_token_id=None,
    )
    return Stepwise(save_words(folder, V))


@pytest.fixture(scope="module")
def joints(reference: Stepwise) -> dict[str, np.ndarray]:
    return {name: reference.joint_of_three(PROMPT, params) for name, params in PARAMS.items()}


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("draft"), "llama", seed=9, vocab_size=V, num_hidden_layers=1, initializer_range=0.1
    )


def speculator(kind: str, joint: np.ndarray, draft_folder: Path) -> dict[str, Any]:
    """Drafts that are often right: the likeliest triples, whatever the target draws, or samples of another model."""
    triples = np.stack(np.unravel_index(np.argsort(-joint, axis=None)[:60], joint.shape), axis=1)
    oracle = Oracle([PROMPT + triple.tolist() for triple in triples], V, hit_rate=0.8, seed=1)
    if kind == "chain":
        return provide(lambda c, t: TokenSpeculator(oracle))
    if kind == "tree":
        return provide(lambda c, t: TreeSpeculator(oracle, (1,), 6))
    return provide(lambda c, t: ModelSpeculator(t, draft_folder, c.num_speculative_tokens), gamma=3)


def padded(tokens: list[int]) -> list[int]:
    """Three tokens; an output that ended goes on with its last one."""
    return [*tokens, *[tokens[-1]] * 3][:3]


@pytest.mark.parametrize(
    ("kind", "name", "requests"),
    slow_except(
        [
            *((kind, name, REQUESTS) for kind in ("chain", "tree", "model") for name in PARAMS),
            ("tree", "penalties", FEWER_REQUESTS),
            ("tree", "bad words", FEWER_REQUESTS),
        ],
        ("tree", "penalties", FEWER_REQUESTS),
        ("tree", "bad words", FEWER_REQUESTS),
    ),
)
def test_joint_of_three_tokens(
    reference: Stepwise, joints: dict[str, np.ndarray], draft_folder: Path, kind: str, name: str, requests: int
) -> None:
    with LLM(
        reference.folder,
        strict=True,
        check_parity=False,
        max_num_seqs=250,
        max_num_batched_tokens=3000,
        memory="256MiB",
        **speculator(kind, joints[name], draft_folder),
    ) as llm:
        outputs = llm.generate([PROMPT] * requests, PARAMS[name])
        assert requests / 8 < llm.engine.stats.num_accepted_draft_tokens < llm.engine.stats.num_draft_tokens
    samples = np.array([padded(output.outputs[0].token_ids) for output in outputs])
    assert worst_p_value(samples, joints[name]) > THRESHOLD


def random_params(choose: random.Random) -> SamplingParams:
    """Any parameters that shape a distribution."""
    ids = range(V)
    options: dict[str, Any] = {
        "presence_penalty": choose.uniform(-2, 2),
        "frequency_penalty": choose.uniform(-2, 2),
        "repetition_penalty": choose.uniform(0.6, 2),
        "logit_bias": {token: choose.uniform(-3, 3) for token in choose.sample(ids, 3)},
        "allowed_token_ids": choose.sample(ids, 10),
        "bad_words": [" ".join(word(choose.randrange(6)) for _ in range(choose.randint(1, 3))) for _ in range(12)],
        "min_tokens": choose.randint(1, 6),
        "stop_token_ids": choose.sample(ids, 3),
        "temperature": choose.uniform(0.3, 2),
        "top_k": choose.randint(1, 12),
        "top_p": choose.uniform(0.4, 0.99),
        "min_p": choose.uniform(0.01, 0.3),
    }
    return SamplingParams(**{name: value for name, value in options.items() if choose.random() < 0.5})


@pytest.mark.parametrize("seed", range(60))
def test_the_distribution_after_every_node(seed: int) -> None:
    """Rows with and without rules, chains and trees, packed into one step; the target's logits are random numbers."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, sequences, offsets = [], [], [0]
    for _ in range(4):
        params = random_params(choose)
        tokens = [choose.randrange(6) for _ in range(choose.randint(3, 12))]
        draft = [choose.randrange(6) for _ in range(choose.randint(0, 8))]
        parents = None if choose.random() < 0.3 else [choose.randint(-1, node - 1) for node in range(len(draft))]
        words = [[int(part[1:-1]) for part in each.split()] for each in params.bad_words]
        stop = frozenset(params.stop_token_ids)
        rules = LogitsRules(params, V, stop, words, torch.device("cpu")) if params.changes_logits else None
        num_prompt = choose.randint(3, len(tokens))
        rows.append(DistributionRow(params, rules, tokens, num_prompt, draft, parents))
        paths = [tokens]
        for node, token in enumerate(draft):
            paths.append([*paths[(node - 1 if parents is None else parents[node]) + 1], token])
        sequences += [(path, rows[-1]) for path in paths]
        offsets.append(len(sequences))
    logits = 3 * torch.randn(len(sequences), V, generator=generator)
    untouched = logits.clone()
    step = StepDistributions(logits, offsets, rows)
    entries = choose.sample(range(len(sequences)), len(sequences))
    probs, best = step.probs(entries), step.argmax(entries)
    for entry, got, token in zip(entries, probs, best, strict=True):
        path, row = sequences[entry]
        ids, stop = torch.tensor([path]), set(row.params.stop_token_ids)
        scores = ruled_scores(untouched[entry][None], ids, row.num_prompt_tokens, row.params, stop)
        assert token == int(scores.argmax())
        wanted = distributions(scores, ids, row.params)[0]
        assert torch.equal(got > 0, wanted > 0), (row, path)
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits, untouched), "the target's own logits are still needed for log-probabilities"


def test_the_parameters_matter(reference: Stepwise, joints: dict[str, np.ndarray]) -> None:
    """As many samples of the distribution without them are told apart."""
    rng = np.random.default_rng(0)
    plain = reference.joint_of_three(PROMPT, SamplingParams(**COMMON))
    for joint in joints.values():
        drawn = rng.choice(V**3, size=REQUESTS, p=joint.ravel() / joint.sum())
        samples = np.stack([drawn // V**2, drawn // V % V, drawn % V], axis=1)
        assert worst_p_value(samples, joint) > THRESHOLD
        assert worst_p_value(samples, plain) < THRESHOLD
