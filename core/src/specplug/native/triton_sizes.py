"""How work is cut for the GPU kernels: known from shapes alone, so that a schedule and a captured kernel agree."""

from __future__ import annotations

from functools import lru_cache

import attrs
import torch

ITEM_FIELDS = 8
SCHEDULE_HEADER = 4
SPLIT = 128  # KV entries are shared out between programs by so many; merging more and smaller parts costs more than it gains
MOST_SHARES = 256  # counters of one block of queries
_WAVES = 2
_QUERIES = (
    (16, 4),
    (64, 8),
    (256, 16),
)  # few queries a block while there are few: the cache is then read from L2 again


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
def attention_sizes(tokens: int, group: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> AttentionSizes:
    """The constants for a batch of `tokens`."""
    queries = queries_per_block(tokens)
    key_block, value_block = _power(key_dim), _power(value_dim)
    wide = max(key_block, value_block) > 128
    if dtype == torch.float32:
        most_lanes, tile, stages = 32, 32, 1 if wide else 2
    else:
        most_lanes, tile, stages = (64, 64, 2) if wide else (128, 64, 3)
    chunk = min(group, max(1, most_lanes // queries))
    lanes = _power(queries * chunk)
    return AttentionSizes(
        queries=queries,
        chunk=chunk,
        chunks=-(-group // chunk),
        lanes=lanes,
        tile=tile,
        key_block=key_block,
        value_block=value_block,
        warps=8 if lanes >= 128 or (wide and lanes >= 64) else 4,
        stages=stages,
    )


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


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())
