"""A GPU's attention schedule takes every query to every entry it may see, exactly once, and cuts long rows only."""

from __future__ import annotations

import numpy as np
import pytest

from specplug.model.attention.plan import attention_plan, scheduled_plan
from specplug.native.gpu.sizes import MOST_SHARES, queries_per_block
from support.kernel_rows import BLOCKS, random_row


@pytest.mark.parametrize("wanted", [1, 5, 33, 264])
@pytest.mark.parametrize("seed", range(12))
def test_every_query_meets_every_entry_once(seed: int, wanted: int) -> None:
    rng = np.random.default_rng(seed)
    free = rng.permutation(BLOCKS).tolist()
    kinds = rng.choice(["decode", "prefill", "tree", "deep tree"], size=int(rng.integers(1, 5)))
    rows = [random_row(rng, free, kind) for kind in kinds]
    tokens = sum(len(row.tokens) for row in rows) + int(rng.integers(0, 9))
    plain = attention_plan(rows)
    plan = np.concatenate([np.asarray(piece, dtype=np.int32) for piece in scheduled_plan(rows, tokens, wanted)])
    assert np.array_equal(np.delete(plan[: len(plain)], 3), np.delete(plain, 3))
    schedule = plan[plan[3] :]
    items = schedule[4 : 4 + 8 * schedule[0]].reshape(-1, 8)
    counters = schedule[4 + 8 * schedule[0] :]
    assert not counters.any()
    queries = queries_per_block(tokens)
    met = [np.zeros((len(row.tokens), row.start + len(row.tokens)), dtype=int) for row in rows]
    for number, first, begin, end, *_ in items:
        row = rows[number]
        last = row.start + (len(row.tokens) if row.tree is not None else min(first + queries, len(row.tokens)))
        assert begin < min(end, last), "an item without work"
        met[number][first : first + queries, begin : min(end, last)] += 1
    for row, seen in zip(rows, met, strict=True):
        for query in range(len(row.tokens)):
            last = seen.shape[1] if row.tree is not None else row.start + query + 1
            assert (seen[query, row.first : last] == 1).all()
            assert not seen[query, : row.first].any()
    check_parts(items, counters, schedule, wanted)


def check_parts(items: np.ndarray, counters: np.ndarray, schedule: np.ndarray, wanted: int) -> None:
    """Parts of one block follow each other, share one counter, and are few enough for the kernel's memory."""
    cut = items[items[:, 4] > 1]
    assert len(cut) <= 2 * wanted
    assert cut[:, 5].tolist() == list(range(len(cut)))
    groups = {(row, first): cut[(cut[:, 0] == row) & (cut[:, 1] == first)] for row, first in cut[:, :2].tolist()}
    places = set()
    for group in groups.values():
        assert (group[:, 4] == len(group)).all()
        assert len(set(group[:, 6].tolist())) == len(set(group[:, 7].tolist())) == 1
        places.add(int(group[0, 7]))
    assert len(places) == len(groups) == len(counters) // MOST_SHARES
    assert all(len(schedule) - len(counters) <= place <= len(schedule) - MOST_SHARES for place in places)
