"""What catching up costs: some for the call, some for each token."""

from __future__ import annotations

import pytest

from specplug.speculation.adaptive.catch_up import CatchUpCost
from specplug.speculation.adaptive.settings import AdaptiveSettings


def observed(*calls: tuple[int, float]) -> CatchUpCost:
    cost = CatchUpCost(AdaptiveSettings())
    for tokens, seconds in calls:
        cost.begin(tokens, seconds)
        cost.settle(0.0)
    return cost


def test_calls_of_one_size_are_proportional() -> None:
    cost = observed(*[(100, 0.2)] * 5)
    assert cost.per_call == pytest.approx(0.0)
    assert cost.seconds(300) == pytest.approx(0.6)


def test_calls_of_several_sizes_tell_both_parts() -> None:
    cost = observed(*[(tokens, 5.0 + 0.01 * tokens) for tokens in (100, 1000, 300, 2000, 256)])
    assert cost.per_call == pytest.approx(5.0)
    assert cost.per_token == pytest.approx(0.01)
    assert cost.share(100, 1600) == pytest.approx((5.0 + 16.0) / 16)


def test_no_tokens_cost_nothing() -> None:
    cost = observed((100, 1.0), (1000, 1.0))
    assert cost.seconds(0) == cost.share(0, 0) == 0.0


def test_a_first_call_that_seemed_free_does_not_settle_it() -> None:
    cost = observed((100, 0.0), *[(100, 1.0)] * 20)
    assert cost.seconds(100) == pytest.approx(1.0, rel=0.05)


def test_one_slow_call_counts_for_three() -> None:
    assert observed(*[(100, 1.0)] * 20, (100, 50.0)).seconds(100) < 1.5


def test_a_call_may_turn_out_longer_than_it_took_to_return() -> None:
    cost = CatchUpCost(AdaptiveSettings())
    assert not cost.is_known
    cost.begin(100, 0.1)
    assert cost.open_call == (100, 0.1)
    assert cost.is_known
    cost.settle(0.9)
    assert cost.open_call is None
    assert cost.seconds(100) == pytest.approx(1.0)
