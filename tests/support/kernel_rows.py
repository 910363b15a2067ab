"""Random rows of a forward batch, as the kernels' comparisons with PyTorch use them."""

from __future__ import annotations

import numpy as np

from specplug.model.kv_cache import BlockTable
from specplug.model.rows import ForwardRow, TreeMask

BLOCK, BLOCKS = 8, 64


def random_row(rng: np.random.Generator, free: list[int], kind: str) -> ForwardRow:
    start = int(rng.integers(0, 70))
    count = int(rng.integers(1, 7)) if kind != "prefill" else int(rng.integers(20, 60))
    if kind == "prefill" and rng.random() < 0.5:
        start = 0
    tail = count
    tree = None
    if kind == "tree":
        tree = TreeMask.from_parents(start, [int(rng.integers(-1, node)) for node in range(count - 1)])
    elif kind == "deep tree":  # new nodes of a tree whose first part lies in the cache, as tree drafters run them
        whole = TreeMask.from_parents(start, [int(rng.integers(-1, node)) for node in range(count + 39)])
        tail = count + 40
        tree = TreeMask(start, whole.visible[-count:], whole.positions)
    length = start + tail
    table = BlockTable(BLOCK)
    needed = -(-length // BLOCK)
    blocks = [free.pop() for _ in range(needed)]
    table.extend(sorted(blocks) if rng.random() < 0.5 else blocks)
    first = int(rng.integers(0, start)) if start and rng.random() < 0.3 else 0
    return ForwardRow(rng.integers(0, 9, count).tolist(), length - count, table, tree, first=first)
