# ruff: noqa: N803 - constants of a kernel are named like constants
"""The most likely token of a few rows of logits for NVIDIA GPUs: PyTorch gives each row to one program, which takes long.

A program takes a piece of a row and puts its best into the row's result, a number that orders as the logits do: NaN before
everything, then the highest, then the first of equals. What comes to the host is that number.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_PIECE = 2048
_LEAST = -(1 << 63)


@triton.jit
def _argmax_kernel(logits, best, vocabulary, stride, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1)
    column = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    is_there = column < vocabulary
    value = tl.load(logits + row.to(tl.int64) * stride + column, mask=is_there, other=float("-inf")).to(tl.float32)
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(value == value, bits, 0x7FFFFFFF)
    # what is masked is the last of the lowest, and never wins
    order = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    tl.atomic_max(best + row, tl.max(order, 0), sem="relaxed")


def argmax(logits: torch.Tensor) -> tuple[list[int], list[bool]]:
    """For each row of [N, V], V dense: the first of the highest entries, and whether the row holds NaN. The host waits."""
    found = _orders(logits).tolist()
    return [0x7FFFFFFF - (order & 0xFFFFFFFF) for order in found], [order >> 32 == 0x7FFFFFFF for order in found]


def argmax_there(logits: torch.Tensor) -> torch.Tensor:
    """The same as int64 [N] on the GPU, -1 for a row that holds NaN; the host does not wait."""
    order = _orders(logits)
    return torch.where(order >> 32 == 0x7FFFFFFF, -1, 0x7FFFFFFF - (order & 0xFFFFFFFF))


def _orders(logits: torch.Tensor) -> torch.Tensor:
    rows, vocabulary = logits.shape
    best = torch.full((rows,), _LEAST, dtype=torch.int64, device=logits.device)
    launch: Any = _argmax_kernel[(-(-vocabulary // _PIECE), rows)]
    with torch.cuda.device(logits.device):
        launch(logits, best, vocabulary, logits.stride(0), PIECE=_PIECE, num_warps=4)
    return best
