"""What plain decoding would have taken, from the costs that are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specplug.contract.types import DraftDistributions
from specplug.engine.trace import Tracer
from specplug.request import StepOutput
from specplug.speculation.adaptive.controller import AdaptiveDraftLength
from specplug.speculation.draft import Draft
from specplug.speculation.draft_length import DraftLengthPolicy, FixedDraftLength
from specplug.trace import StepTrace

REQUEST: Any = SimpleNamespace(error=None)
LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.2, 0.2, 0.6]]))


def step(tracer: Tracer, draft: Draft | None, path: list[int], seconds: float, decoding: bool = True) -> StepTrace:
    """One step of one row, which took `seconds` and a millisecond to propose."""
    tokens = [draft.tokens[node] for node in path] if draft else []
    sources: list[str | None] = [*["it" for _ in path], None]
    nodes = 0 if draft is None else len(draft)
    output = tracer.record(StepOutput(REQUEST, [*tokens, 2], sources, []), draft, path, LOGITS[: 1 + nodes], 1)
    target: Any = SimpleNamespace(rows=[REQUEST], requests=[REQUEST], offsets=[0, 1 + nodes])
    tracer.end_step(target, decoding, seconds, seconds + 0.001)
    assert not tracer.open
    assert output.trace is not None
    return output.trace


def drafted() -> Draft:
    return Draft("it", [0, 1])


def test_steps_without_drafts_are_measured() -> None:
    tracer = Tracer(FixedDraftLength())
    assert step(tracer, drafted(), [0], 0.02).plain_seconds is None  # nothing is known yet
    plain = step(tracer, None, [], 0.01)
    assert (plain.plain_seconds, plain.seconds, plain.propose_seconds) == pytest.approx((0.01, 0.011, 0.001))
    assert step(tracer, drafted(), [0], 0.02).plain_seconds == pytest.approx(0.02)  # two tokens
    assert step(tracer, drafted(), [0, 1], 0.02).plain_seconds == pytest.approx(0.03)
    assert step(tracer, drafted(), [0], 0.02, decoding=False).plain_seconds is None


@pytest.mark.parametrize(("timings", "expected"), [(8, 0.01), (2, 0.04)])
def test_learned_costs_come_first(timings: int, expected: float) -> None:
    """Unless they rest on too few timings, and a plain step was measured."""
    policy = AdaptiveDraftLength([])
    for _ in range(timings):
        policy.targets.observe(1, 0, 0.01)
    tracer = Tracer(policy)
    step(tracer, None, [], 0.04)
    assert step(tracer, drafted(), [], 0.02).plain_seconds == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("policy", [FixedDraftLength(), AdaptiveDraftLength([])])
def test_probabilities(policy: DraftLengthPolicy) -> None:
    """Of tokens and nodes by the target, and of nodes by the draft: distributions over a part of the vocabulary."""
    draft = drafted()
    assert [node.draft_prob for node in step(Tracer(policy), draft, [0], 0.01).nodes] == [None, None]
    draft.probs = DraftDistributions(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), token_ids=torch.tensor([1, 0]))
    trace = step(Tracer(policy), draft, [0], 0.01)
    assert [node.draft_prob for node in trace.nodes] == pytest.approx([0.1, 0.3])
    assert [node.target_prob for node in trace.nodes] == pytest.approx([0.5, 0.2])
    assert trace.probs == pytest.approx([0.5, 0.7])
    assert [node.accepted for node in trace.nodes] == [True, False]


def test_an_interrupted_step_leaves_nothing() -> None:
    tracer = Tracer(FixedDraftLength())
    tracer.record(StepOutput(REQUEST, [2], [None], []), None, [], LOGITS[:1], 1)
    assert tracer.open
    tracer.abandon()
    assert not tracer.open
