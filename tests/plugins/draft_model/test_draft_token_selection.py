"""Drawing a token per row: from which distribution, whose randomness, and when a row stops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specplug import Budget, ProposalRow, SamplingParams, TokenView, process
from specplug_draft_model.token_selection import draw
from support.statistics import THRESHOLD, p_value

pytestmark = pytest.mark.unit

V = 12
GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=0.7, top_k=8)
SEEDED = SamplingParams(temperature=0.7, seed=3)


def make_row(sampling: SamplingParams, seed: int = 0) -> ProposalRow:
    generator = torch.Generator().manual_seed(seed)
    return ProposalRow(
        row_id=0,
        is_new=False,
        tokens=TokenView([1]),
        new_positions=range(0),
        budget=Budget(4, 4),
        sampling=sampling,
        generator=lambda: generator,
    )


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(1)) * 2


def test_tokens_are_drawn_from_the_reported_distribution(logits: torch.Tensor) -> None:
    trials = 20_000
    rows = [make_row(SAMPLED, seed) for seed in range(trials)]
    draws = draw(logits.expand(trials, V), rows, sample=True, threshold=0.0)
    probs = draws.probs[0]
    assert probs is not None
    torch.testing.assert_close(probs, process(logits[None], [SAMPLED])[0])
    assert p_value(np.bincount(draws.tokens, minlength=V), probs.double().numpy()) > THRESHOLD


def test_rows_that_sampling_cannot_help_take_the_most_likely_token(logits: torch.Tensor) -> None:
    rows = [make_row(params) for params in (GREEDY, SAMPLED, SEEDED, GREEDY)]
    stacked = torch.stack([logits, logits.flip(0), logits.flip(0), logits.roll(3)])
    draws = draw(stacked, rows, sample=True, threshold=0.0)
    best = stacked.argmax(dim=-1).tolist()
    assert [draws.tokens[index] for index in (0, 2, 3)] == [best[index] for index in (0, 2, 3)]
    assert [probs is None for probs in draws.probs] == [True, False, True, True]
    torch.testing.assert_close(draws.probs[1], process(stacked[1:2], [SAMPLED])[0])
    deterministic = draw(stacked, rows, sample=False, threshold=0.0)
    assert deterministic.tokens == best
    assert deterministic.probs == [None] * 4


def test_every_row_draws_from_its_own_stream(logits: torch.Tensor) -> None:
    """Whatever else is in the batch, and in whatever order."""
    alone = {
        seed: draw(logits[None], [make_row(SAMPLED, seed)], sample=True, threshold=0.0).tokens[0] for seed in range(9)
    }
    assert len(set(alone.values())) > 2
    rows = [make_row(SAMPLED, seed) for seed in reversed(range(9))] + [make_row(GREEDY)]
    together = draw(logits.expand(10, V), rows, sample=True, threshold=0.0)
    assert together.tokens[:9] == [alone[seed] for seed in reversed(range(9))]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, SEEDED], ids=["greedy", "sampled", "seeded"])
def test_stopping_depends_on_the_distribution_and_never_on_the_token(
    logits: torch.Tensor, params: SamplingParams
) -> None:
    probs = process(logits[None], [params])[0] if params is SAMPLED else logits.softmax(-1)
    highest = float(probs.max())
    rows = [make_row(params, seed) for seed in range(500)]
    many = logits.expand(500, V)
    free = draw(many, rows, sample=True, threshold=0.0).tokens
    rows = [make_row(params, seed) for seed in range(500)]
    below = draw(many, rows, sample=True, threshold=highest - 0.01).tokens
    above = draw(many, rows, sample=True, threshold=highest + 0.01).tokens
    assert below == free, "every row goes on, with the tokens it would have drawn anyway"
    assert above == [None] * 500
    if params is SAMPLED:
        assert len(set(free)) > 3


def test_rows_stop_one_by_one() -> None:
    flat, steep = torch.zeros(V), torch.zeros(V)
    steep[4] = 9.0
    rows = [make_row(params, seed) for seed, params in enumerate((GREEDY, GREEDY, SAMPLED, SAMPLED))]
    draws = draw(torch.stack([flat, steep, flat, steep]), rows, sample=True, threshold=0.5)
    assert draws.tokens == [None, 4, None, 4]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    only = SamplingParams(temperature=1.0, top_k=1)
    logits = torch.arange(V).float().expand(300, V)
    draws = draw(logits, [make_row(only, seed) for seed in range(300)], sample=True, threshold=0.0)
    assert draws.tokens == [V - 1] * 300
