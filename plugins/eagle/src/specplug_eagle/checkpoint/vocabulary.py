"""The map from a reduced draft vocabulary to the target's: offsets (`d2t`) and membership (`t2d`)."""

from __future__ import annotations

import torch

from specplug import CheckpointError
from specplug_eagle.head.spec import HeadSpec


def read_draft_to_target(
    spec: HeadSpec, d2t: torch.Tensor | None, t2d: torch.Tensor | None
) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Turns a checkpoint's maps into target ids.

    Args:
        spec: the head.
        d2t: integers [draft vocabulary]: target id − draft id.
        t2d: bool [vocabulary]: which target ids are in the draft vocabulary.

    Returns:
        Target ids, int64 [draft vocabulary] on the maps' device (None: draft ids are target ids), and warnings.

    Raises:
        CheckpointError: an id beyond the vocabulary, ids that do not ascend, or maps that contradict each other.
    """
    reduced = spec.draft_vocab_size != spec.vocab_size
    members = None if t2d is None else t2d.ne(0).nonzero().flatten()
    warnings: tuple[str, ...] = ()
    if d2t is None:
        if not reduced:
            return None, ()
        if members is None:
            raise CheckpointError(
                f"the head's output has {spec.draft_vocab_size} of {spec.vocab_size} tokens, but neither d2t nor t2d says "
                "which"
            )
        ids = _members(members, spec)
    elif reduced and members is not None and not d2t.any() and not _is_prefix(members, spec.draft_vocab_size):
        ids = _members(members, spec)
        warnings = ("d2t is all zeros, but t2d names other tokens than the first; d2t was rebuilt from t2d",)
    else:
        ids = torch.arange(len(d2t), device=d2t.device, dtype=torch.long) + d2t.to(torch.int64)
        if reduced and members is None and not d2t.any():
            warnings = (f"d2t is all zeros: the draft vocabulary is taken to be the first {len(d2t)} tokens",)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= spec.vocab_size):
            worst = int(ids.max()) if int(ids.max()) >= spec.vocab_size else int(ids.min())
            raise CheckpointError(f"d2t leads to token {worst}, but the vocabulary has {spec.vocab_size} tokens")
        if bool((ids[1:] <= ids[:-1]).any()):
            raise CheckpointError(
                "d2t leads to target ids that do not ascend; it should hold offsets: target id - draft id"
            )
        if members is not None and not torch.equal(ids, members):
            raise CheckpointError(
                f"d2t and t2d contradict each other: d2t names {len(ids)} tokens, t2d {len(members)}, of which "
                f"{int(torch.isin(ids, members).sum())} are the same"
            )
    if len(ids) == spec.vocab_size:
        return None, warnings
    return ids, warnings


def offsets(draft_to_target: torch.Tensor) -> torch.Tensor:
    """Target ids, int64 [draft vocabulary] → `d2t`."""
    return draft_to_target - torch.arange(len(draft_to_target), device=draft_to_target.device, dtype=torch.long)


def membership(draft_to_target: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Target ids, int64 [draft vocabulary] → `t2d`, bool [vocabulary]."""
    mask = torch.zeros(vocab_size, dtype=torch.bool, device=draft_to_target.device)
    mask[draft_to_target] = True
    return mask


def _is_prefix(members: torch.Tensor, count: int) -> bool:
    return torch.equal(members, torch.arange(count, device=members.device, dtype=torch.long))


def _members(members: torch.Tensor, spec: HeadSpec) -> torch.Tensor:
    if len(members) != spec.draft_vocab_size:
        raise CheckpointError(f"t2d names {len(members)} tokens, but the head's output has {spec.draft_vocab_size}")
    return members
