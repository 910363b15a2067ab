"""Recorded runs are replayed as they were: what was accepted then is accepted now, whatever length is drafted."""

from __future__ import annotations

import random

import pytest
from simulated_lengths import MeasuredAsking, MeasuredTarget, Trace, replay

from specplug import SpeculatorTraits

TRAITS = SpeculatorTraits(token_only=True)
TARGET = MeasuredTarget([10e-3 + 0.1e-3 * nodes for nodes in range(10)], 1)
ASKING = MeasuredAsking([20e-6] * 8, 1, 0.0)


@pytest.mark.parametrize(("drafted", "accepted", "expected"), [(8, 3, 4.0), (2, 2, 3.0), (8, 0, 1.0), (0, 0, 1.0)])
def test_a_fixed_length_brings_what_was_accepted(drafted: int, accepted: int, expected: float) -> None:
    trace: Trace = [[(drafted, accepted, [])] * 95]
    rate, looked = replay(trace, TARGET, ASKING, TRAITS, 8, 0)
    assert rate == pytest.approx(expected * 10e-3 / (10e-3 + 0.1e-3 * drafted + 20e-6), rel=0.05)
    assert looked == 0.0


def test_automatic_lengths_come_near_the_best() -> None:
    trace: Trace = [[(8, position % 4, []) for position in range(95)]] * 3
    fixed = max(replay(trace, TARGET, ASKING, TRAITS, depth, 0)[0] for depth in range(1, 9))
    auto, looked = replay(trace, TARGET, ASKING, TRAITS, None, 0)
    assert auto > 0.93 * fixed  # it begins knowing nothing
    assert 0.0 < looked < 1.0


def test_chances_that_were_recorded_stop_chains_again() -> None:
    """They foretell how many tokens come true; a fixed length drafts too few or too many."""
    asking = MeasuredAsking([1e-3 * depth for depth in range(1, 9)], 1, 0.0)
    chooser = random.Random(0)
    accepted = [[chooser.choice([0, 0, 1, 5, 7]) for _ in range(95)] for _ in range(3)]
    trace: Trace = [[(8, own, [0.99] * own + [0.02] * (8 - own)) for own in text] for text in accepted]
    fixed = max(replay(trace, TARGET, asking, SpeculatorTraits(), depth, 0)[0] for depth in range(1, 9))
    auto, _ = replay(trace, TARGET, asking, SpeculatorTraits(), None, 0)
    assert auto > 1.02 * fixed
