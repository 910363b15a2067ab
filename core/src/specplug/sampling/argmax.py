"""The most likely token of every row of logits, and its probability: what a greedy draft needs of a vocabulary."""

from __future__ import annotations

import torch

from specplug.native import library

_NATIVE = (torch.float32, torch.bfloat16)


def is_fast(logits: torch.Tensor) -> bool:
    """Whether our kernels compute it."""
    native = logits.device.type == "cpu" and logits.dtype in _NATIVE and library.available()
    return native and logits.stride(1) == 1


def argmax_with_prob(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the highest logits of each row, and its probability under the softmax.

    Our CPU kernels write no distribution. PyTorch's operations do: of all rows on a GPU, of one row at a time elsewhere.

    Args:
        logits: [N, V], of any floating dtype.

    Returns:
        int64 [N], token ids; float32 [N], their probabilities, NaN where a row holds NaN.
    """
    if is_fast(logits):
        return torch.ops.specplug.argmax_with_prob(logits)
    parts = logits.split(1) if logits.device.type == "cpu" else (logits,)
    best = [part.softmax(dim=-1, dtype=torch.float32).max(dim=-1) for part in parts]
    return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])
