"""The start-up rule of automatic draft lengths: what is assumed before anything is measured."""

from __future__ import annotations

import pytest

from specplug.contract.types import Budget
from specplug.speculation.adaptive import AdaptiveDraftLength, AdaptiveSettings
from specplug.speculation.adaptive.acceptance import AcceptanceModel, RowAcceptance
from specplug.speculation.adaptive.cost_model import target_curve
from specplug.speculation.draft_length import ProposeCall
from support.simulation import Link, Simulation, Target

TARGET = Target()


def started(link: Link) -> tuple[AdaptiveDraftLength, Simulation]:
    """The policy of a new engine with one row, after the step that computed its prompt."""
    simulation = Simulation([link], target=TARGET, rows=1)
    assert isinstance(simulation.policy, AdaptiveDraftLength)
    return simulation.policy, simulation


def planned(policy: AdaptiveDraftLength, simulation: Simulation) -> int | Budget | None:
    """What the first row may draft in a step."""
    assert policy.begin(simulation.requests)
    (length,) = policy.plan(simulation.speculators[0], simulation.requests, {}, lambda request: True)
    return length


def test_a_drafted_token_is_assumed_to_be_accepted_with_probability_0_6() -> None:
    model, row = AcceptanceModel(8, AdaptiveSettings()), RowAcceptance()
    assert row.gains(model, 3, 0.0, 0) == pytest.approx([0.6, 0.6**2, 0.6**3])
    for _ in range(3):  # worth three drafts
        model.record(row, 0, rejected=True)
    assert row.gains(model, 1, 0.0, 0)[0] < 0.35


def test_verifying_a_token_is_assumed_to_cost_a_fixed_share_of_a_plain_step() -> None:
    curve = target_curve(AdaptiveSettings())
    curve.observe(0, 2.0)
    assert curve.seconds(4) == pytest.approx(2.0 * (1 + 4 * 0.015))


def test_a_speculator_of_tokens_may_draft_as_deep_as_pays_by_these_assumptions() -> None:
    policy, simulation = started(Link.tokens(lambda row, at: 0.9))
    length = planned(policy, simulation)
    assert isinstance(length, Budget)
    assert length.max_depth >= 3
    assert policy.estimates[0].depth_to_try == 8


def test_a_speculator_with_a_state_drafts_few_tokens_at_first_and_then_twice_as_many_as_were_timed() -> None:
    policy, simulation = started(Link.model(lambda row, at: 0.9, 0.1, TARGET))
    length = planned(policy, simulation)
    assert isinstance(length, Budget)
    assert 1 <= length.max_depth <= 3
    (estimate,) = policy.estimates
    assert estimate.depth_to_try == 3
    for deepest, most in ((2, 4), (3, 6), (6, 8), (8, 8)):
        policy.proposed(estimate.speculator, 1e-3, ProposeCall({simulation.requests[0].number: deepest}))
        assert estimate.depth_to_try == most


def test_a_proposal_is_assumed_to_take_time_in_proportion_to_its_depth() -> None:
    policy, simulation = started(Link.model(lambda row, at: 0.9, 0.1, TARGET))
    (estimate,) = policy.estimates
    policy.proposed(estimate.speculator, 1e-3, ProposeCall({simulation.requests[0].number: 2}))
    assert estimate.seconds_by_depth(1)[:4] == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3])


def test_a_new_prompt_is_shown_to_a_speculator_whose_costs_are_not_known() -> None:
    policy, simulation = started(Link.head(lambda row, at: 0.0, 0.3, TARGET))
    (request,) = simulation.requests
    request.num_computed = 0  # the prompt is being computed
    assert planned(policy, simulation) == 0


def test_other_depths_are_timed_in_every_other_step_at_first() -> None:
    simulation = Simulation([Link.tokens(lambda row, at: 0.7)], target=TARGET, rows=1, length=10_000)
    for _ in range(25):
        simulation.step()
    usual = max(set(simulation.nodes[1:]), key=simulation.nodes[1:].count)
    others = [nodes for nodes in simulation.nodes[1:] if nodes != usual]
    assert len(others) >= 8
    assert 0 in others
