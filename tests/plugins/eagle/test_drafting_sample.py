"""`specplug.sample`, which drafts are drawn with: without replacement, in draw order, and never what is impossible."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specplug import sample
from support.statistics import THRESHOLD, p_value

pytestmark = pytest.mark.unit

Q = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05, 0.0])


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def test_ordered_pairs_are_draws_without_replacement() -> None:
    drawn = sample(Q.expand(60_000, -1).contiguous(), generators(60_000), 3).numpy()
    counts, expected = np.zeros((6, 6, 6)), np.zeros((6, 6, 6))
    np.add.at(counts, tuple(drawn.T), 1)
    q = Q.double().numpy()
    for a, b, c in np.ndindex(6, 6, 6):
        if len({a, b, c}) == 3 and 5 not in (a, b, c):
            expected[a, b, c] = q[a] * q[b] / (1 - q[a]) * q[c] / (1 - q[a] - q[b])
    assert p_value(counts, expected) > THRESHOLD


def test_one_draw_is_from_the_distribution() -> None:
    drawn = sample(Q.expand(60_000, -1).contiguous(), generators(60_000), 1).numpy()[:, 0]
    assert p_value(np.bincount(drawn, minlength=6), Q.double().numpy()) > THRESHOLD


@pytest.mark.parametrize("support", [1, 2, 3])
def test_what_cannot_be_drawn_is_marked(support: int) -> None:
    """Also for probabilities so small that the race's arrivals are near the largest number there is."""
    probs = torch.zeros(500, 6)
    probs[:, 1] = 1.0
    probs[:, 3 : 2 + support] = 1e-30
    drawn = sample(probs, generators(500), 4)
    possible = {1, *range(3, 2 + support)}
    assert (drawn[:, 0] == 1).all()
    for row in drawn.tolist():
        assert set(row[:support]) == possible
        assert row[support:] == [-1] * (4 - support)


def test_a_shared_stream_gives_different_draws() -> None:
    (shared,) = generators(1)
    drawn = sample(torch.full((200, 6), 1 / 6), [shared] * 200, 2)
    assert len({tuple(row) for row in drawn.tolist()}) > 20
    again = sample(torch.full((200, 6), 1 / 6), generators(1) * 200, 2)
    assert drawn.tolist() == again.tolist()


def test_distributions_are_not_changed() -> None:
    probs = Q.repeat(3, 1)
    sample(probs, generators(3), 2)
    assert torch.equal(probs, Q.repeat(3, 1))
