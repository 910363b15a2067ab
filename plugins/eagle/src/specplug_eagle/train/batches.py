"""Micro-batches of texts and their order, a function of seed and epoch, so that a run can be resumed."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug_eagle.train.data import Sample

_SORTED_TOGETHER = 64


@attrs.frozen(eq=False)
class Batch:
    """Right-padded texts.

    Attributes:
        indices: of the samples.
        ids: int64 [B, T].
        labels: int64 [M], indices among B · T, of the positions whose next token is a label.
    """

    indices: tuple[int, ...]
    ids: torch.Tensor
    labels: torch.Tensor


def plan_epoch(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Shuffles texts into micro-batches of at most `batch_tokens` padded tokens (or one text), similar lengths together."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator, dtype=torch.int64, device="cpu").tolist()
    mean = max(1, sum(lengths) // len(lengths))
    stretch = _SORTED_TOGETHER * max(1, batch_tokens // mean)
    batches: list[tuple[int, ...]] = []
    for start in range(0, len(order), stretch):
        batches += fill(sorted(order[start : start + stretch], key=lambda i: lengths[i]), lengths, batch_tokens)
    return [
        batches[i] for i in torch.randperm(len(batches), generator=generator, dtype=torch.int64, device="cpu").tolist()
    ]


def fill(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, ...]]:
    """Cuts an order of texts into batches of at most `batch_tokens` padded tokens (or one text)."""
    batches: list[tuple[int, ...]] = []
    current: list[int] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if current and longest * (len(current) + 1) > batch_tokens:
            batches.append(tuple(current))
            current, longest = [], lengths[index]
        current.append(index)
    return [*batches, tuple(current)] if current else batches


def collate(samples: Sequence[Sample], indices: tuple[int, ...], device: torch.device) -> Batch:
    """Pads texts with token 0 on the right."""
    length = max(len(samples[index]) for index in indices)
    ids = torch.zeros(len(indices), length, dtype=torch.int64, device="cpu")
    learned = torch.zeros(len(indices), length, dtype=torch.bool, device="cpu")
    for row, index in enumerate(indices):
        sample = samples[index]
        ids[row, : len(sample)] = sample.ids
        learned[row, 1 : len(sample) - 1] = sample.learned[2:]
    labels = learned.flatten().nonzero().flatten()
    return Batch(indices, ids.to(device, non_blocking=True), labels.to(device, non_blocking=True))
