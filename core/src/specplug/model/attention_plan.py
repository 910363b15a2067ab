"""The array that tells native attention which rows a batch has, where their KV lies, and what trees show.

int32: a header [rows, tokens, block size, 0]; eight fields per row (see `_ROW`); then the block numbers of rows that are not
one slice, and the trees: the positions of the entries behind the prefix, and for each query the bits of those it sees.
`native/cpu/attention/plan.h` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from specplug.model.forward import ForwardRow, TreeMask

_HEADER = 4
_ROW = ("query", "count", "length", "base", "table", "hidden", "tree", "prefix")


def attention_plan(rows: Sequence[ForwardRow]) -> np.ndarray:
    """Writes the plan of a batch; see the module."""
    fields, extras = plan_pieces(rows)
    head = np.array(fields, dtype=np.int32)
    return np.concatenate([head, *extras]) if extras else head


def plan_pieces(rows: Sequence[ForwardRow]) -> tuple[list[int], list[np.ndarray]]:
    """The same in pieces: header and rows, then tables and trees."""
    block_size = rows[0].table.block_size if rows else 1
    fields: list[int] = [len(rows), 0, block_size, 0]
    extras: list[np.ndarray] = []
    offset = _HEADER + len(rows) * len(_ROW)
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
    """Positions of the entries behind the prefix; then, word by word, what each of the `count` queries sees of them."""
    visible = tree.visible.numpy()
    bits = np.packbits(visible, axis=1, bitorder="little")
    words = np.zeros((count, -(-visible.shape[1] // 32) * 4), dtype=np.uint8)
    words[:, : bits.shape[1]] = bits
    return np.asarray(tree.positions, dtype=np.int32), words.view(np.int32).reshape(-1)
