"""How work is cut for the GPU kernels: known from shapes alone, so that a schedule and a captured kernel agree."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import attrs
import torch

SCHEDULE_HEADER = 4
SPLIT = 128  # KV entries are shared out between programs by so many; merging more and smaller parts costs more than it gains
MOST_SHARES = 256  # counters of one block of queries
_WAVES = 2
_QUERIES = (
    (16, 4),
    (64, 8),
    (256, 16),
)  # few queries a block while there are few: the cache is then read from L2 again
_MANY_TOKENS = 256  # more are bound by arithmetic
_FEW_TOKENS = 4
_USUAL_SHARED = 99 << 10  # where there is no GPU to ask: what the smallest that is served has

MOST_ROWS = 64
_FEW_COLUMNS = 16384


@attrs.frozen
class AttentionSizes:
    """The kernel's constants.

    Attributes:
        queries: of a row in one block.
        chunk: query heads of a block; all of a group unless that were too many.
        chunks: blocks that the heads of a group make.
        lanes: rows of the products, queries times heads and padding.
        tile: KV entries at once.
        key_block: key_dim, padded.
        value_block: value_dim, padded.
        warps: of a program.
        stages: loads under way.
    """

    queries: int
    chunk: int
    chunks: int
    lanes: int
    tile: int
    key_block: int
    value_block: int
    warps: int
    stages: int


def queries_per_block(tokens: int) -> int:
    """Queries of one row that a program takes, in a batch of so many tokens."""
    most = next((queries for limit, queries in _QUERIES if tokens <= limit), 32)
    return min(most, 1 << max(0, tokens - 1).bit_length())


@lru_cache(maxsize=512)
def attention_sizes(
    tokens: int, group: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, shared: int
) -> AttentionSizes:
    """The constants for a batch of `tokens`.

    Args:
        tokens: of the launch.
        group: query heads of a KV head.
        kv_heads: KV heads.
        key_dim: width of a key.
        value_dim: width of a value.
        dtype: of the cache.
        shared: bytes of shared memory that a program may use.
    """
    queries = queries_per_block(tokens)
    key_block, value_block = _power(key_dim), _power(value_dim)
    wide = max(key_block, value_block) > 128
    if dtype == torch.float32:
        most_lanes, tile, stages, warps = 32, 32, 1 if wide else 2, 4
    elif tokens > _MANY_TOKENS:
        most_lanes, tile, stages, warps = 64 if wide else 128, 64, 1, 8
    elif tokens > _FEW_TOKENS or wide:
        most_lanes, tile, stages, warps = 64, 64, 1, 8 if wide else 4
    else:
        most_lanes, tile, stages, warps = 64, 128, 1, 8
    most_chunks = max(1, MOST_SHARES // kv_heads)
    chunk = max(min(group, max(1, most_lanes // queries)), -(-group // most_chunks))
    lanes = _power(queries * chunk)
    while (used := attention_bytes(lanes, tile, stages, key_block, value_block, dtype)) > shared:
        if stages > 1:
            stages -= 1
        elif tile > 16:
            tile //= 2
        else:
            raise ValueError(
                f"attention needs {used:,} bytes of shared memory, and this GPU has {shared:,}; SPECPLUG_NATIVE=0 leaves it to "
                "PyTorch"
            )
    return AttentionSizes(
        queries=queries,
        chunk=chunk,
        chunks=-(-group // chunk),
        lanes=lanes,
        tile=tile,
        key_block=key_block,
        value_block=value_block,
        warps=warps,
        stages=stages,
    )


def attention_bytes(lanes: int, tile: int, stages: int, key_block: int, value_block: int, dtype: torch.dtype) -> int:
    """Shared memory of a program, at most: keys, values and queries as often as there are stages, and probabilities."""
    elements = stages * (tile * (key_block + value_block) + lanes * key_block) + lanes * tile
    return elements * dtype.itemsize


@attrs.frozen
class LinearSizes:
    """The constants of a product of few rows.

    Attributes:
        rows: of the states, padded.
        columns: of a program.
        inner: elements of a row at once.
        stages: of which all but one are loads under way.
        warps: of a program.
    """

    rows: int
    columns: int
    inner: int
    stages: int
    warps: int

    @property
    def num_bytes(self) -> int:
        """Shared memory of a program, at most."""
        return 2 * (self.stages - 1) * (self.columns + self.rows) * self.inner


# the fastest of sweeps over the weights of an 8B model on an H100
_UP_TO_16_ROWS = LinearSizes(16, 16, 512, 3, 2)
_MANY_COLUMNS = {32: LinearSizes(32, 128, 128, 4, 4), 64: LinearSizes(64, 128, 128, 4, 4)}
_SOME_COLUMNS = {32: LinearSizes(32, 32, 128, 6, 4), 64: LinearSizes(64, 32, 128, 6, 4)}


@lru_cache(maxsize=512)
def linear_sizes(rows: int, columns: int, shared: int) -> LinearSizes:
    """How a product of so many rows with so many columns of weights is cut, on a GPU with so much shared memory."""
    if rows <= 16:
        sizes = _UP_TO_16_ROWS
    else:
        sizes = (_MANY_COLUMNS if columns > _FEW_COLUMNS else _SOME_COLUMNS)[32 if rows <= 32 else 64]
    while sizes.num_bytes > shared and sizes.stages > 2:
        sizes = attrs.evolve(sizes, stages=sizes.stages - 1)
    return sizes


def wanted_items(kv_heads: int, device: torch.device) -> int:
    """Into how many items a batch is to be cut, if it has not as many blocks of queries anyway."""
    return -(-_WAVES * _processors(device) // kv_heads)


def num_programs(tokens: int, plan_length: int, kv_heads: int, shares: int, device: torch.device) -> tuple[int, int]:
    """(programs per share of the heads, the most parts that blocks can be cut into)."""
    wanted = wanted_items(kv_heads, device)
    most_rows = min(tokens, plan_length // 8)
    most_items = tokens // queries_per_block(tokens) + most_rows + wanted
    useful = max(wanted, 16 * _processors(device) // shares)
    return min(most_items, useful), 2 * wanted


def scratch_bytes(
    tokens: int, group: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes of the parts that one attention launch keeps until they are merged."""
    sizes = attention_sizes(tokens, group, kv_heads, key_dim, value_dim, dtype, shared_memory(device))
    cells = 2 * wanted_items(kv_heads, device) * kv_heads * sizes.chunks * sizes.lanes
    return cells * (sizes.value_block + 2) * torch.float32.itemsize


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use there."""
    return int(_properties(device).shared_memory_per_block_optin) if device.type == "cuda" else _USUAL_SHARED


def overlaps(device: torch.device) -> bool:
    """Whether a kernel there can begin while the one before it ends."""
    return bool(_properties(device).major >= 9)


@lru_cache(maxsize=64)
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _processors(device: torch.device) -> int:
    return int(_properties(device).multi_processor_count) if device.type == "cuda" else 4


def _power(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())
