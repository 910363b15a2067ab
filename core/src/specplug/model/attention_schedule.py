"""How a batch's attention is shared out over a GPU: which program takes which queries against which KV entries.

Appended to the attention plan, at the offset in its fourth field: a header [items, 0, 0, 0], then eight fields per item (row,
first query, first entry, end of entries, parts of its block, part, the block's first part, counter), then the blocks'
counters, zero between launches. `native/triton_attention.py` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from specplug.native.triton_sizes import MOST_SHARES, SCHEDULE_HEADER, SPLIT, queries_per_block

if TYPE_CHECKING:
    from specplug.model.forward import ForwardRow


def add_schedule(plan: np.ndarray, rows: Sequence[ForwardRow], tokens: int, wanted: int) -> np.ndarray:
    """The plan with its schedule.

    Args:
        plan: of these rows.
        rows: the rows.
        tokens: of the launch; as many as the rows have, or more where a captured one is padded.
        wanted: how many items would fill the GPU.
    """
    queries = queries_per_block(tokens)
    blocks: list[tuple[int, int, int, int]] = []
    pieces = 0
    for number, row in enumerate(rows):
        count = len(row.tokens)
        for first in range(0, count, queries):
            end = row.start + (count if row.tree is not None else min(first + queries, count))
            blocks.append((number, first, row.first, end))
            pieces += -(-(end - row.first) // SPLIT)
    most = max(1, -(-pieces // wanted))
    items: list[int] = []
    parts = counters = 0
    counters_at = len(plan) + SCHEDULE_HEADER
    for number, first, begin, end in blocks:
        size = -(-(end - begin) // SPLIT)
        step = -(-size // -(-size // most))
        cuts = range(begin, end, step * SPLIT)
        counter = counters
        if len(cuts) > 1:
            counters += 1
        for part, cut in enumerate(cuts):
            items += (number, first, cut, min(cut + step * SPLIT, end), len(cuts), parts + part, parts, counter)
        if len(cuts) > 1:
            parts += len(cuts)
    counters_at += len(items)
    tail = np.array([len(items) // 8, 0, 0, 0, *items], dtype=np.int32)
    fields = tail[SCHEDULE_HEADER:].reshape(-1, 8)
    fields[:, 7] = fields[:, 7] * MOST_SHARES + counters_at
    plan = np.concatenate([plan, tail, np.zeros(counters * MOST_SHARES, dtype=np.int32)])
    plan[3] = counters_at - len(items) - SCHEDULE_HEADER
    return plan
