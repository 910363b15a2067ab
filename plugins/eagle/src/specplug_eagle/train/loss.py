"""The loss of an unroll in pieces, so that logits over the vocabulary never exist for all positions and steps at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import torch

from specplug_eagle.head import DraftHead

_LOGITS_AT_ONCE = {"cuda": 2**28, "cpu": 2**22}


@attrs.frozen(eq=False)
class Piece:
    """Some label positions with everything predicted for them.

    Attributes:
        positions: int64 [C], indices of label positions among B · T.
        draft: [S, C, draft vocabulary], each step's logits for these positions.
        target: float32 [C, vocabulary], the target's logits.
        exists: bool [S, C], whether the text has a row that predicts this position at this step.
    """

    positions: torch.Tensor
    draft: torch.Tensor
    target: torch.Tensor
    exists: torch.Tensor


def pieces(
    head: DraftHead,
    outputs: torch.Tensor,
    final: torch.Tensor,
    labels: torch.Tensor,
    length: int,
    target_logits: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[Piece]:
    """Lines up all steps' predictions by label position: position u is predicted at step s by row u − 1 − s.

    Args:
        head: the head.
        outputs: [S, B · T, hidden] of `unroll`.
        final: [B · T, target hidden], after the target's final norm.
        labels: int64 [M], the positions among B · T that count.
        length: T.
        target_logits: the target's output layer.
    """
    steps = len(outputs)
    back = torch.arange(1, steps + 1, device=outputs.device, dtype=torch.int64)[:, None]
    width = max(steps * head.spec.draft_vocab_size, head.spec.vocab_size)
    size = max(1, _LOGITS_AT_ONCE.get(outputs.device.type, 2**24) // width)
    for positions in labels.split(size):
        rows = (positions - back).clamp(min=0)
        exists = positions % length >= back
        states = outputs.gather(1, rows[:, :, None].expand(-1, -1, outputs.shape[-1]))
        with torch.no_grad():
            target = target_logits(final[positions]).float()
        yield Piece(positions, head.logits(states.flatten(0, 1)).unflatten(0, rows.shape), target, exists)


def piece_loss(head: DraftHead, piece: Piece, decay: float) -> torch.Tensor:
    """Σ over a piece of decay^s · cross entropy with the target's distribution over the draft vocabulary.

    Positions whose argmax is not in the draft vocabulary count as zero.
    """
    members, counted = head.draft_to_target, piece.exists
    if members is None:
        wanted = piece.target.softmax(-1)
    else:
        wanted = piece.target[:, members].softmax(-1)
        counted = counted & torch.isin(piece.target.argmax(-1), members)
    weights = decay ** torch.arange(len(counted), device=counted.device, dtype=torch.float32)
    entropy = -(wanted * piece.draft.float().log_softmax(-1)).sum(-1)
    return (entropy * counted * weights[:, None]).sum()


def backward(
    head: DraftHead,
    outputs: torch.Tensor,
    final: torch.Tensor,
    labels: torch.Tensor,
    length: int,
    target_logits: Callable[[torch.Tensor], torch.Tensor],
    decay: float,
    scale: float,
) -> torch.Tensor:
    """Adds the gradient of `scale` × the mean loss of all labels to the head's parameters.

    Gradients go from each piece to the outputs separately, and from all outputs through the unroll at once.

    Returns:
        The mean loss of a label, summed over steps with their weights; without gradient.
    """
    held = outputs.detach().requires_grad_()
    total = torch.zeros((), device=outputs.device, dtype=torch.float32)
    for piece in pieces(head, held, final, labels, length, target_logits):
        loss = piece_loss(head, piece, decay) / len(labels)
        (loss * scale).backward()
        total += loss.detach()
    outputs.backward(held.grad)
    return total
