"""How GPU kernels are cut is known from shapes and shared memory alone, and fits the smallest GPUs that are served."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from specplug.native.gpu.cuda import misfit
from specplug.native.gpu.sizes import MOST_ROWS, MOST_SHARES, attention_bytes, attention_sizes, linear_sizes

SMALLEST = 99 << 10  # sm_86 and sm_89; sm_80 has 163 KiB, sm_90 227
# (lanes, tile, stages, dim, dtype, bytes that Triton 3.6 allocated for sm_86 or sm_90, the larger)
COMPILED = [
    (16, 128, 1, 128, torch.bfloat16, 71_680),
    (16, 64, 1, 128, torch.bfloat16, 37_888),
    (128, 64, 2, 128, torch.bfloat16, 131_072),
    (128, 64, 1, 128, torch.bfloat16, 73_728),
    (64, 64, 2, 256, torch.bfloat16, 180_224),
    (64, 64, 1, 256, torch.bfloat16, 102_400),
    (16, 32, 1, 128, torch.float32, 41_472),
    (32, 32, 2, 128, torch.float32, 57_344),
    (32, 32, 1, 256, torch.float32, 99_328),
    (32, 32, 2, 64, torch.float32, 32_896),
]


@pytest.mark.parametrize(("lanes", "tile", "stages", "dim", "dtype", "used"), COMPILED)
def test_the_estimate_is_never_below_what_is_allocated(
    lanes: int, tile: int, stages: int, dim: int, dtype: torch.dtype, used: int
) -> None:
    assert used <= attention_bytes(lanes, tile, stages, dim, dim, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (64, 8), (6, 2), (16, 1), (40, 40), (128, 128), (71, 1)])
def test_attention_fits_the_smallest_gpus(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    group = heads // kv_heads
    for tokens, dim in product((1, 2, 4, 5, 16, 17, 64, 65, 256, 257, 8192), (16, 64, 80, 128, 192, 256)):
        sizes = attention_sizes(tokens, group, kv_heads, dim, dim, dtype, SMALLEST)
        used = attention_bytes(sizes.lanes, sizes.tile, sizes.stages, sizes.key_block, sizes.value_block, dtype)
        assert used <= SMALLEST
        assert sizes.lanes >= sizes.queries * sizes.chunk
        assert sizes.chunk * sizes.chunks >= group
        assert kv_heads * sizes.chunks <= MOST_SHARES, "every share of a block has its counter"


def test_products_fit_the_smallest_gpus() -> None:
    for rows, columns in product(range(1, MOST_ROWS + 1), (8, 4096, 28_672, 128_256)):
        sizes = linear_sizes(rows, columns, SMALLEST)
        assert sizes.num_bytes <= SMALLEST
        assert sizes.rows >= rows
        assert linear_sizes(rows, columns, 227 << 10).stages >= sizes.stages >= 2


def test_what_the_attention_kernel_does_not_serve_is_said() -> None:
    assert not misfit(8, 128, torch.bfloat16)
    assert "dtype is torch.float64" in misfit(8, 128, torch.float64)
    assert "300 heads" in misfit(300, 128, torch.bfloat16)
    assert "512 wide" in misfit(8, 512, torch.bfloat16)
