"""How a batch's attention is shared out over a GPU: which program takes which queries against which KV entries.

Behind the attention plan, at the offset in its fourth field: a header [items, 0, 0, 0], then eight fields per item (row,
first query, first entry, end of entries, parts of its block, part, the block's first part, counter), then the blocks'
counters, zero between launches; counters are told by their distance from the header. An end may lie behind the last entry that
its queries see, which the kernel knows from the row: a schedule then serves until a row outgrows its last split, and is kept.
`native/gpu/attention.py` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from specplug.model.attention_plan import plan_pieces
from specplug.native.gpu.sizes import MOST_SHARES, SCHEDULE_HEADER, SPLIT, queries_per_block

if TYPE_CHECKING:
    from specplug.model.forward import ForwardRow

PlanPiece = list[int] | np.ndarray
_Extent = tuple[int, tuple[int, ...]]  # the first entry a row sees, and of each block of its queries the splits it sees


def scheduled_plan(rows: Sequence[ForwardRow], tokens: int, wanted: int) -> list[PlanPiece]:
    """The attention plan of a batch and its schedule, in pieces that follow each other.

    Args:
        rows: the rows.
        tokens: of the launch; as many as the rows have, or more where a captured one is padded.
        wanted: how many items would fill the GPU.
    """
    queries = queries_per_block(tokens)
    fields, extras = plan_pieces(rows)
    fields[3] = len(fields) + sum(len(extra) for extra in extras)
    return [fields, *extras, _schedule(tuple(_extent(row, queries) for row in rows), queries, wanted)]


def _extent(row: ForwardRow, queries: int) -> _Extent:
    count, before = len(row.tokens), row.start - row.first
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
