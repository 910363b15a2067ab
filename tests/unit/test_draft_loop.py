"""A loop's outputs are those of its steps one by one, for rows of different lengths, with inputs of their own."""

from __future__ import annotations

import torch

from specplug.contract.resources import KVLayer
from specplug.model.kv_cache import BlockTable, KVCache
from specplug.model.loop import plain_loop
from specplug.model.paged import PagedBatch
from specplug.model.rows import ForwardRow

BLOCK = 4


def begin(
    batch: PagedBatch, ids: torch.Tensor, last: torch.Tensor, given: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    value = (10 * batch.positions + ids + given)[last]
    return [value], value


def step(batch: PagedBatch, value: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    following = 2 * value + batch.positions
    return [following], following


def test_every_row_gets_its_own_outputs_in_its_own_place() -> None:
    cache = KVCache([KVLayer(1, 4, 4)], 32, BLOCK, torch.float32, torch.device("cpu"))
    given = torch.arange(100, 120)
    loop = plain_loop(begin, step, cache, 4, [given])
    rows, counts, places = [], [2, 4, 1, 3, 0, 1], [7, 0, 3, 9, 5, 4]
    given_rows = [(3, [5]), (0, [1, 2, 3]), (6, [4, 4]), (0, [1, 2, 3, 4, 5, 6, 7]), (2, [8, 9]), (1, [1] * 6)]
    for number, (start, tokens) in enumerate(given_rows):
        table = BlockTable(BLOCK)
        table.extend(range(4 * number, 4 * number + 4))
        rows.append(ForwardRow(tokens, start, table))
    found = loop(rows, counts, places)
    assert found.shape == (4, 6)
    for row, count, place, outputs in zip(rows, counts, places, found.T.tolist(), strict=True):
        position = row.start + len(row.tokens) - 1
        value = 10 * position + row.tokens[-1] + int(given[place + len(row.tokens) - 1])
        expected = [value]
        for _ in range(count - 1):
            position += 1
            value = 2 * value + position
            expected.append(value)
        assert outputs[:count] == expected[:count]
