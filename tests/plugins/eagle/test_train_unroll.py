"""The unroll equals drafting, and its loss equals the loss written down directly."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from attention_forms import CachedAttend
from tiny_targets import VOCABULARY, make_target

from specplug_eagle.head import DraftHead
from specplug_eagle.train.batches import collate
from specplug_eagle.train.build import head_spec, new_head
from specplug_eagle.train.data import Sample
from specplug_eagle.train.loss import backward, pieces
from specplug_eagle.train.options import HeadOptions
from specplug_eagle.train.target import Target
from specplug_eagle.train.unroll import unroll

pytestmark = pytest.mark.unit

STEPS = 4
LENGTHS = (13, 9, 16)


def setting(members: torch.Tensor | None = None, window: int | None = None, **options: Any) -> tuple[Target, DraftHead]:
    target = make_target()
    chosen = HeadOptions(draft_vocab_size=None if members is None else len(members), layer_ids=(2, 4, 8), **options)
    spec = head_spec(chosen, target)
    if window is not None:
        spec = attrs.evolve(spec, windows=(window,) * spec.num_layers)
    head = new_head(spec, chosen, target, members, 1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return target, head


def texts() -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    return [
        Sample(
            torch.randint(VOCABULARY, (length,), generator=generator, dtype=torch.int32),
            torch.rand(length, generator=generator) < 0.8,
        )
        for length in LENGTHS
    ]


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({}, None),
        ({"norm_before_residual": False, "norm_output": True}, None),
        ({"fc_norm": True, "num_layers": 2}, None),
        ({"norm_before_fc": True, "num_kv_heads": 1}, 5),
    ],
)
def test_every_step_of_the_unroll_equals_drafting_from_a_cache(options: dict[str, Any], window: int | None) -> None:
    target, head = setting(window=window, **options)
    samples = texts()
    batch = collate(samples, (0, 1, 2), target.device)
    features = target.states(batch.ids, (2, 4, 8)).features
    outputs = unroll(head, features, batch.ids, STEPS)
    together = outputs.unflatten(1, batch.ids.shape)
    worst = 0.0
    for row, sample in enumerate(samples):
        ids = sample.ids.long()
        own = features[row]
        for t in (0, 1, 5, len(ids) - 1 - STEPS):
            if t + STEPS >= len(ids):
                continue
            attend = CachedAttend()
            result = head(head.embed(ids[1 : t + 2]), head.fuse(own[: t + 1]), torch.arange(t + 1), attend)
            for step in range(STEPS):
                if step:
                    at = torch.tensor([t + step])
                    result = head(head.embed(ids[at + 1]), result.feedback[-1:], at, attend)
                alone, unrolled = head.logits(result.output[-1]), head.logits(together[step, row, t])
                worst = max(worst, (alone - unrolled).abs().max().item())
    assert worst <= 1e-5


def test_positions_line_up_with_what_they_predict() -> None:
    """Label position u of step s: drafted by the row that holds the target's states up to u − 1 − s."""
    target, head = setting()
    batch = collate(texts(), (0, 1, 2), target.device)
    states = target.states(batch.ids, (2, 4, 8))
    outputs = unroll(head, states.features, batch.ids, STEPS)
    length = batch.ids.shape[1]
    (piece,) = pieces(head, outputs, states.final.flatten(0, 1), batch.labels, length, target.logits)
    whole = target.model(batch.ids).logits.flatten(0, 1)
    assert torch.allclose(piece.target, whole[batch.labels], atol=1e-5)
    for column, position in enumerate(batch.labels.tolist()):
        for step in range(STEPS):
            assert piece.exists[step, column] == (position % length >= step + 1)
            if piece.exists[step, column]:
                expected = head.logits(outputs[step, position - 1 - step])
                assert torch.allclose(piece.draft[step, column], expected, atol=1e-6)


@pytest.mark.parametrize("reduced", [False, True])
def test_loss_and_gradient_equal_the_definition(reduced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specplug_eagle.train.loss._LOGITS_AT_ONCE", {"cpu": 7 * STEPS * VOCABULARY})
    members = torch.arange(1, VOCABULARY, 2) if reduced else None
    target, head = setting(members)
    samples = texts()
    batch = collate(samples, (0, 1, 2), target.device)
    states = target.states(batch.ids, (2, 4, 8))
    outputs = unroll(head, states.features, batch.ids, STEPS)
    loss = backward(
        head, outputs, states.final.flatten(0, 1), batch.labels, batch.ids.shape[1], target.logits, 0.8, 1.0
    )
    gradients = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    head.zero_grad()

    chosen = torch.arange(VOCABULARY) if members is None else members
    outputs = unroll(head, states.features, batch.ids, STEPS).unflatten(1, batch.ids.shape)
    total, count = torch.zeros(()), 0
    for row, sample in enumerate(samples):
        p = target.model(sample.ids[None].long()).logits[0].detach()
        for u in range(1, len(sample) - 1):
            if not sample.learned[u + 1]:
                continue
            count += 1
            for step in range(STEPS):
                t = u - 1 - step
                if t >= 0 and p[u].argmax() in chosen:
                    q = head.logits(outputs[step, row, t]).log_softmax(-1)
                    total = total - 0.8**step * (p[u][chosen].softmax(-1) * q).sum()
    (total / count).backward()
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5)
    for name, parameter in head.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=2e-5, rtol=1e-3), name
