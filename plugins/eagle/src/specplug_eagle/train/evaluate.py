"""Held-out acceptance: the acceptance length of the head's chains on held-out texts."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import torch

from specplug_eagle.head import DraftHead
from specplug_eagle.train.batches import Batch
from specplug_eagle.train.loss import Piece, pieces
from specplug_eagle.train.states import StateSource
from specplug_eagle.train.target import Target
from specplug_eagle.train.unroll import unroll


@attrs.frozen
class Acceptance:
    """Means over all rows whose chain of γ steps lies within labels.

    The chain is teacher forced: each step reads the text's token, and the head's own hidden state. On texts that the target
    wrote greedily, `greedy_length` is exactly the mean acceptance length of greedy decoding; elsewhere both are estimates.

    Attributes:
        agreement: per step, how often draft and target have the same argmax.
        overlap: per step, Σ min(p, q): the probability that a sampled draft token is accepted.
        greedy_length: tokens per target forward with γ greedy drafts, bonus token included.
        sampled_length: the same with drafts sampled from q, from the product of overlaps.
        rows: how many chains were measured.
    """

    agreement: tuple[float, ...]
    overlap: tuple[float, ...]
    greedy_length: float
    sampled_length: float
    rows: int


@torch.no_grad()
def evaluate(
    head: DraftHead,
    target: Target,
    states: StateSource,
    batches: Iterable[Batch],
    gamma: int,
    temperature: float = 1.0,
) -> Acceptance:
    """Measures acceptance.

    Args:
        head: the head.
        target: its target.
        states: the target's states.
        batches: texts.
        gamma: draft tokens of a chain.
        temperature: that both distributions are taken at, for the overlap.

    Returns:
        Means; all zero and one if no text is long enough for a chain.
    """
    sums = torch.zeros(4, gamma, dtype=torch.float64, device="cpu")
    rows = 0
    for batch in batches:
        given, length = states(batch), batch.ids.shape[1]
        with autocast(batch.ids.device):
            outputs = unroll(head, given.features, batch.ids, gamma)
            agree = torch.zeros(gamma, batch.ids.numel(), device=batch.ids.device, dtype=torch.float32)
            overlap = torch.zeros_like(agree)
            final = given.final.flatten(0, 1)
            for piece in pieces(head, outputs, final, batch.labels, length, target.logits):
                agree[:, piece.positions] = _agreement(head, piece)
                overlap[:, piece.positions] = _overlap(head, piece, temperature)
        chains = _chain_starts(batch.labels, batch.ids.numel(), length, gamma)
        steps = torch.arange(gamma, device=chains.device, dtype=torch.int64)[:, None]
        agree, overlap = agree.gather(1, chains + steps), overlap.gather(1, chains + steps)
        rows += chains.shape[-1]
        for place, values in enumerate((agree, overlap, agree.cumprod(0), overlap.cumprod(0))):
            sums[place] += values.sum(1, dtype=torch.float64).cpu()
    means = (sums / max(rows, 1)).tolist()
    return Acceptance(tuple(means[0]), tuple(means[1]), 1 + sum(means[2]), 1 + sum(means[3]), rows)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; a CPU computes as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _agreement(head: DraftHead, piece: Piece) -> torch.Tensor:
    drafted = piece.draft.argmax(-1)
    if head.draft_to_target is not None:
        drafted = head.draft_to_target[drafted]
    return (drafted == piece.target.argmax(-1)).float()


def _overlap(head: DraftHead, piece: Piece, temperature: float) -> torch.Tensor:
    wanted = (piece.target / temperature).softmax(-1)
    if head.draft_to_target is not None:
        wanted = wanted[:, head.draft_to_target]
    return torch.minimum((piece.draft.float() / temperature).softmax(-1), wanted).sum(-1)


def _chain_starts(labels: torch.Tensor, count: int, length: int, gamma: int) -> torch.Tensor:
    """Label positions from which γ in a row are learned, in one text: int64 [1, N]."""
    learned = torch.zeros(count + gamma, dtype=torch.bool, device=labels.device)
    learned[labels] = True
    whole = learned.unfold(0, gamma, 1).all(-1)[:count]
    start = torch.arange(count, device=labels.device, dtype=torch.int64)
    return start[whole & (start % length + gamma <= length)][None]
