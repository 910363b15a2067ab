"""Medians, intervals and ratios on known data."""

from __future__ import annotations

import numpy as np
import pytest

from specplug.bench.summary import estimate, paired_ratio, quantile

pytestmark = pytest.mark.unit


def test_a_median_and_its_interval() -> None:
    found = estimate([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found.median == 3.0
    assert 1.0 <= found.low < 3.0 < found.high <= 5.0


def test_the_same_sample_gives_the_same_interval() -> None:
    assert estimate([1.0, 4.0, 2.0]) == estimate([1.0, 4.0, 2.0])


def test_one_value_is_its_own_interval() -> None:
    assert estimate([7.5]) == estimate([7.5, 7.5])


def test_nothing_has_no_median() -> None:
    with pytest.raises(ValueError, match="no value"):
        estimate([])


@pytest.mark.engine
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 95 % intervals over 15 draws, about 95 % hold the median of what was drawn from."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = estimate(rng.lognormal(0.0, 0.3, size=15).tolist())
        hits += found.low <= 1.0 <= found.high
    assert 0.9 <= hits / 200 <= 0.99


def test_what_slows_a_repetition_cancels_out() -> None:
    slow = np.array([1.0, 0.2, 0.7, 0.5])
    found = paired_ratio((150 * slow).tolist(), (100 * slow).tolist())
    assert (found.median, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))


def test_ratios_need_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0, 2.0], [1.0])


def test_quantiles() -> None:
    assert quantile([], 0.5) is None
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert quantile(list(range(101)), 0.99) == pytest.approx(99.0)


def test_json_has_six_digits() -> None:
    assert estimate([1.23456789]).as_json() == {"median": 1.23457, "low": 1.23457, "high": 1.23457}
