"""The acceptance model, the cost model and the allocation of adaptive draft lengths, each by itself."""

from __future__ import annotations

import itertools
import random

import pytest

from specplug.speculation.adaptive import AdaptiveSettings
from specplug.speculation.adaptive.acceptance import AcceptanceModel, RowAcceptance
from specplug.speculation.adaptive.cost_model import target_curve
from specplug.speculation.adaptive.goodput import allocate


def trusts(rates: list[float], *, drafts: int = 40, seed: int = 0) -> list[float]:
    """How far other rows are trusted after each row of these rates, in turn, has had so many drafts of one token."""
    chooser = random.Random(seed)
    engine = AcceptanceModel(8, AdaptiveSettings())
    seen = []
    for rate in rates:
        row = RowAcceptance()
        for _ in range(drafts):
            hit = chooser.random() < rate
            engine.record(row, int(hit), rejected=not hit)
        seen.append(engine.trust)
    return seen[len(seen) // 2 :]


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_differ_little_do_not_follow_their_own_luck(seed: int) -> None:
    kept = trusts([0.5, 0.8] * 20, seed=seed)
    assert sum(trust == 24.0 for trust in kept) >= 0.8 * len(kept)


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_differ_much_are_judged_by_their_own_drafts(seed: int) -> None:
    assert max(trusts([0.95, 0.05] * 20, seed=seed)) <= 6.0


def test_one_rows_depth_is_the_best_of_all() -> None:
    chooser = random.Random(1)
    for _ in range(200):
        gains = sorted((chooser.random() for _ in range(chooser.randrange(9))), reverse=True)
        step, each, ask = chooser.uniform(1, 5), chooser.uniform(0.01, 1), chooser.uniform(0.01, 1)
        rates = [
            (1 + sum(gains[:depth])) / (step + each * depth + (0.1 + ask * depth if depth else 0))
            for depth in range(len(gains) + 1)
        ]
        depths, rate = allocate(
            [gains],
            tokens=1.0,
            nodes=0,
            width=[1.0] * 64,
            target=[step + each * nodes for nodes in range(64)],
            call=lambda rows, ask=ask: [0.1 + ask * depth for depth in range(1, 9)],
        )
        assert rate == pytest.approx(max(rates))
        assert rates[depths[0]] == pytest.approx(rate)


def test_two_rows_share_about_as_well_as_any_two_depths_would() -> None:
    chooser = random.Random(2)
    for _ in range(100):
        gains = [sorted((chooser.random() for _ in range(4)), reverse=True) for _ in range(2)]
        ask = chooser.uniform(0.01, 0.5)

        def rate_of(depths: tuple[int, ...], gains: list[list[float]] = gains, ask: float = ask) -> float:
            asked = sum(depth > 0 for depth in depths)
            seconds = 3 + 0.2 * sum(depths) + (0.1 * asked + ask * max(depths) if asked else 0)
            return (2 + sum(sum(own[:depth]) for own, depth in zip(gains, depths, strict=True))) / seconds

        best = max(map(rate_of, itertools.product(range(5), repeat=2)))
        depths, rate = allocate(
            gains,
            tokens=2.0,
            nodes=0,
            width=[1.0] * 64,
            target=[3 + 0.2 * nodes for nodes in range(64)],
            call=lambda rows, ask=ask: [0.1 * rows + ask * depth for depth in range(1, 5)],
        )
        assert rate == pytest.approx(rate_of(tuple(depths)))
        assert rate >= 0.97 * best


def test_a_cost_curve_finds_the_line_in_noisy_timings() -> None:
    curve = target_curve(AdaptiveSettings())
    chooser = random.Random(3)
    for _ in range(300):
        size, noise = chooser.randrange(20), chooser.lognormvariate(0, 0.1)
        curve.observe(size, (3 + 0.1 * size) * noise)
    assert curve.count == 300
    assert curve.table(3, 5) == pytest.approx([3.3, 3.4], rel=0.1)
    assert curve.table(0, 30) == [curve.seconds(size) for size in range(30)]
