"""What a forward needs from the host, in one copy to the GPU that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_PADDING = (0, 0, -1, 0)  # token, position, slot and logits index of a padded token; attention leaves it alone


def staged_length(width: int, num_logits: int, plan_length: int) -> int:
    """int32 elements that a forward of so many tokens takes in a buffer."""
    return 2 * (3 * width + num_logits) + plan_length


def stage(
    longs: Sequence[Sequence[int]],
    plan: np.ndarray,
    device: torch.device,
    buffer: torch.Tensor | None = None,
    width: int | None = None,
) -> list[torch.Tensor]:
    """Copies four lists of integers and the attention plan.

    Args:
        longs: ids, positions, write slots and logits index.
        plan: int32.
        device: where to.
        buffer: int32, the first part of which is filled; None makes a tensor.
        width: the length that every list is padded to; None leaves them as they are.

    Returns:
        The lists as int64 tensors and the plan as an int32 one; all share one piece of memory.
    """
    sizes = [len(values) if width is None else width for values in longs]
    total = sum(sizes)
    host = torch.empty(2 * total + len(plan), dtype=torch.int32, pin_memory=device.type == "cuda")
    array = host.numpy()
    numbers = array[: 2 * total].view(np.int64)
    start = 0
    for values, size, padding in zip(longs, sizes, _PADDING, strict=True):
        numbers[start : start + len(values)] = values
        numbers[start + len(values) : start + size] = padding
        start += size
    array[2 * total :] = plan
    if buffer is None:
        buffer = host.to(device, non_blocking=True)
    else:
        buffer[: len(host)].copy_(host, non_blocking=True)
    return split_buffer(buffer, sizes)


def split_buffer(buffer: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The parts of a filled buffer: one int64 tensor per size, and the rest as it is."""
    total = sum(sizes)
    return [*buffer[: 2 * total].view(torch.int64).split(list(sizes)), buffer[2 * total :]]
