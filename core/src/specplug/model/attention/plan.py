"""The attention plan: one int32 array that tells the kernels which rows a batch has, where their KV is, and their tree masks.

A header [rows, tokens, block size, offset of the schedule or 0]; eight fields per row (see `PLAN_ROW`); then the block numbers
of rows that are not one slice, and the tree masks: the positions of the entries after the prefix, and for each query the bits
of those it may attend to. `native/cpu/attention/plan.h` and `native/gpu/attention.py` read it.

On a GPU a schedule follows: which program takes which queries against which KV entries. A header [items, 0, 0, 0], eight
fields per item (row, first query, first entry, end of entries, splits of its query block, split, the block's first split,
counter), then the blocks' counters, zero between launches; a counter is given by its distance from the header. An item may
end after the last entry that its queries attend to (the kernel knows that one from the row): a schedule serves until a row
outgrows its last split, and is cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from specplug.model.rows import ForwardRow, TreeMask
from specplug.native.gpu.sizes import MOST_SHARES, SCHEDULE_HEADER, SPLIT, queries_per_block

PLAN_HEADER = 4
PLAN_ROW = ("query", "count", "length", "base", "table", "hidden", "tree", "prefix")
PlanPiece = list[int] | np.ndarray
_Extent = tuple[int, tuple[int, ...]]  # a row's first entry, and for each block of its queries how many splits it reads


def attention_plan(rows: Sequence[ForwardRow]) -> np.ndarray:
    """The plan of a batch, without a schedule."""
    fields, extras = _plan_pieces(rows)
    head = np.array(fields, dtype=np.int32)
    return np.concatenate([head, *extras]) if extras else head


def scheduled_plan(rows: Sequence[ForwardRow], tokens: int, wanted: int) -> list[PlanPiece]:
    """The plan of a batch and its schedule, in pieces that follow each other.

    Args:
        rows: the rows.
        tokens: of the launch; as many as the rows have, or more where a captured one is padded.
        wanted: how many items would fill the GPU.
    """
    queries = queries_per_block(tokens)
    fields, extras = _plan_pieces(rows)
    fields[3] = len(fields) + sum(len(extra) for extra in extras)
    return [fields, *extras, _schedule(tuple(_extent(row, queries) for row in rows), queries, wanted)]


def _plan_pieces(rows: Sequence[ForwardRow]) -> tuple[list[int], list[np.ndarray]]:
    """Header and rows, then block tables and trees."""
    block_size = rows[0].table.block_size if rows else 1
    fields: list[int] = [len(rows), 0, block_size, 0]
    extras: list[np.ndarray] = []
    offset = PLAN_HEADER + len(rows) * len(PLAN_ROW)
    query = 0
    for row in rows:
        count = len(row.tokens)
        length = row.start + count
        base, table, tree, prefix = -1, 0, -1, length
        if row.table.contiguous:
            base = row.table.blocks[0] * block_size
        else:
            table = offset
            extras.append(row.table.numbers)
            offset += len(row.table.blocks)
        if row.tree is not None:
            tree, prefix = offset, row.tree.prefix
            extras += _tree(row.tree, count)
            offset += sum(len(part) for part in extras[-2:])
        fields += (query, count, length, base, table, row.first, tree, prefix)
        query += count
    fields[1] = query
    return fields, extras


def _tree(tree: TreeMask, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the entries after the prefix; then the mask of the `count` queries over them, in words of 32 bits."""
    visible = tree.visible.numpy()
    bits = np.packbits(visible, axis=1, bitorder="little")
    words = np.zeros((count, -(-visible.shape[1] // 32) * 4), dtype=np.uint8)
    words[:, : bits.shape[1]] = bits
    return np.asarray(tree.positions, dtype=np.int32), words.view(np.int32).reshape(-1)


def _extent(row: ForwardRow, queries: int) -> _Extent:
    count, before = len(row.tokens), row.start - row.first + row.spare  # where it begins may be decided on the device
    if count <= queries:
        return row.first, (-(-(before + count) // SPLIT),)
    ends = (count if row.tree is not None else min(first + queries, count) for first in range(0, count, queries))
    return row.first, tuple(-(-(before + end) // SPLIT) for end in ends)


@lru_cache(maxsize=32)
def _schedule(rows: tuple[_Extent, ...], queries: int, wanted: int) -> np.ndarray:
    most = max(1, -(-sum(sum(sizes) for _, sizes in rows) // wanted))
    items: list[int] = []
    parts = counters = 0
    for number, (begin, sizes) in enumerate(rows):
        for block, size in enumerate(sizes):
            step = -(-size // -(-size // most))
            count = -(-size // step)
            for part in range(count):
                cut = begin + part * step * SPLIT
                end = cut + step * SPLIT
                items += (number, block * queries, cut, end, count, parts + part, parts, counters)
            if count > 1:
                parts += count
                counters += 1
    head = np.array([len(items) // 8, 0, 0, 0, *items], dtype=np.int32)
    fields = head[SCHEDULE_HEADER:].reshape(-1, 8)
    fields[:, 7] = fields[:, 7] * MOST_SHARES + len(head)
    return np.concatenate([head, np.zeros(counters * MOST_SHARES, dtype=np.int32)])
