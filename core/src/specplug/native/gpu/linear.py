# ruff: noqa: N803 - constants of a kernel are named like constants
"""Products of a few rows with large weights for NVIDIA GPUs, at the speed at which the weights can be read.

A decoding or verifying step multiplies 1 to 64 rows with every weight once: all that counts is to keep enough loads under way.
cuBLAS takes kernels made for many rows there, and needs one launch per matrix. Up to three weights that multiply the same rows
(query, key and value; gate and up) go in one launch here, wherever they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from specplug.native.gpu.sizes import MOST_ROWS, linear_sizes, shared_memory


@triton.jit
def _linear_kernel(  # type: ignore[no-untyped-def]
    states,
    weight,
    bias,
    out_0,
    out_1,
    out_2,
    weight_1,
    weight_2,
    bias_1,
    bias_2,
    blocks_0,
    blocks_1,
    size_0,
    size_1,
    size_2,
    rows,
    inner,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    block = tl.program_id(0)
    which = (block >= blocks_0).to(tl.int32) + (block >= blocks_1).to(tl.int32)
    block = block - tl.where(which == 0, 0, tl.where(which == 1, blocks_0, blocks_1))
    size = tl.where(which == 0, size_0, tl.where(which == 1, size_1, size_2))
    weight += tl.where(which == 0, 0, tl.where(which == 1, weight_1, weight_2))
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    step = tl.arange(0, INNER)
    is_row, is_column = row < rows, column < size
    left = states + row[:, None] * inner + step[None, :]
    right = weight + column.to(tl.int64)[None, :] * inner + step[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in tl.range(0, inner, INNER, num_stages=STAGES):
        if IS_EVEN:
            some = tl.load(left + begin, mask=is_row[:, None], other=0.0)
            panel = tl.load(right + begin, mask=is_column[None, :], other=0.0, eviction_policy="evict_first")
        else:
            is_in = step < inner - begin
            some = tl.load(left + begin, mask=is_row[:, None] & is_in[None, :], other=0.0)
            panel = tl.load(right + begin, mask=is_column[None, :] & is_in[:, None], other=0.0)
        sums = tl.dot(some, panel, sums)
    if HAS_BIAS:
        bias += tl.where(which == 0, 0, tl.where(which == 1, bias_1, bias_2))
        sums += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    result = sums.to(out_0.dtype.element_ty)
    place = row[:, None] * size + column[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(out_0 + place, result, mask=mask & (which == 0))
    tl.store(out_1 + place, result, mask=mask & (which == 1))
    tl.store(out_2 + place, result, mask=mask & (which == 2))


def products(
    states: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """[..., in] times up to three weights [out, in] each."""
    inner = states.shape[-1]
    rows = states.numel() // inner
    if rows > MOST_ROWS or not _can_read_fast(states, weights, biases):
        return tuple(
            torch.nn.functional.linear(states, weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
    states = states.contiguous()
    outs = tuple(states.new_empty(*states.shape[:-1], len(weight)) for weight in weights)
    cut = linear_sizes(rows, sum(len(weight) for weight in weights), shared_memory(states.device))
    blocks = [-(-len(weight) // cut.columns) for weight in weights]
    ends = [sum(blocks[: index + 1]) for index in range(len(blocks))]
    sizes = [len(weight) for weight in weights] + [0, 0]
    launch: Any = _linear_kernel[(ends[-1],)]
    with torch.cuda.device(states.device):
        launch(
            states,
            weights[0],
            weights[0] if biases[0] is None else biases[0],
            outs[0],
            outs[1] if len(outs) > 1 else outs[0],
            outs[2] if len(outs) > 2 else outs[0],
            *(_distances(weights)),
            *(_distances(biases)),
            ends[0],
            ends[1] if len(ends) > 2 else ends[-1],
            *sizes[:3],
            rows,
            inner,
            ROWS=cut.rows,
            COLUMNS=cut.columns,
            INNER=cut.inner,
            HAS_BIAS=biases[0] is not None,
            IS_EVEN=inner % cut.inner == 0,
            STAGES=cut.stages,
            num_warps=cut.warps,
        )
    return outs


def _distances(tensors: Sequence[torch.Tensor | None]) -> tuple[int, int]:
    """From the first tensor to the second and the third, in elements; the kernel is given one address."""
    first = tensors[0]
    if first is None:
        return 0, 0
    others = [0 if t is None else (t.data_ptr() - first.data_ptr()) // first.element_size() for t in tensors[1:]]
    others += [0, 0]
    return others[0], others[1]


def _can_read_fast(
    states: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> bool:
    """Whether the kernel serves these tensors: 16 bits, aligned, all weights of one kind."""
    kinds = {bias is None for bias in biases}
    return (
        states.dtype in (torch.bfloat16, torch.float16)
        and len(kinds) == 1
        and states.shape[-1] % 16 == 0
        and all(w.dtype == states.dtype and w.is_contiguous() and w.data_ptr() % 32 == 0 for w in weights)
    )


def linear(states: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    """See `specplug::linear`; a weight on a GPU is not packed."""
    return products(states, [packed], [bias])[0]


def linears(states: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """See `specplug::linears_2` and `linears_3`."""
    count = len(arguments) // 3
    return products(states, arguments[:count], arguments[count : 2 * count])
