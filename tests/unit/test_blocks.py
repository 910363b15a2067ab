"""Block allocation and scheduling, without any model."""

from __future__ import annotations

import random

import pytest
import torch

from specplug import KVLayer, SamplingParams
from specplug.engine.scheduler import Scheduler
from specplug.model.attention.eager import RowSpan
from specplug.model.kv_cache import BlockAllocator, BlockTable, KVCache
from specplug.model.rows import ForwardRow, TreeMask
from specplug.request import Request
from specplug.sampling.randomness import EngineRandomness, RowRandomness


def test_rows_grow_contiguously_side_by_side() -> None:
    allocator = BlockAllocator(64)
    tables = [BlockTable(4) for _ in range(4)]
    for table in tables:
        table.extend(allocator.allocate(2, expected=16) or [])
    for _ in range(14):
        for table in tables:
            table.extend(allocator.allocate(1, after=table.blocks[-1]) or [])
    assert allocator.num_free == 0
    assert all(table.contiguous for table in tables)


def test_claims_give_way_when_room_is_short() -> None:
    allocator = BlockAllocator(10)
    first = allocator.allocate(1, expected=10)
    second = allocator.allocate(9)
    assert sorted((first or []) + (second or [])) == list(range(10))
    assert allocator.allocate(1) is None


def test_random_use_neither_leaks_nor_shares_by_mistake() -> None:
    chooser = random.Random(0)
    allocator = BlockAllocator(50)
    held: list[tuple[list[int], int]] = []
    for _ in range(5000):
        if held and chooser.random() < 0.5:
            blocks, claimed = held.pop(chooser.randrange(len(held)))
            allocator.release(blocks, claimed=claimed)
        else:
            expected = chooser.randint(1, 12)
            blocks = allocator.allocate(chooser.randint(1, expected), expected=expected)
            if blocks is not None:
                if held and chooser.random() < 0.3:
                    shared = held[0][0][:2]
                    allocator.share(shared)
                    blocks = [*shared, *blocks]
                held.append((blocks, expected))
        in_use = {block for blocks, _ in held for block in blocks}
        assert allocator.num_free == 50 - len(in_use)
    for blocks, claimed in held:
        allocator.release(blocks, claimed=claimed)
    assert allocator.num_free == 50
    assert allocator.allocate(50) == list(range(50))


def test_slots_of_scattered_tables() -> None:
    table = BlockTable(4)
    table.extend([3, 4, 9])
    assert not table.contiguous
    assert list(table.slots(2, 10)) == [14, 15, 16, 17, 18, 19, 36, 37]
    assert table.truncate(2) == [9]
    assert table.contiguous
    assert list(table.slots(2, 6)) == [14, 15, 16, 17]


def test_moving_overlapping_entries() -> None:
    cache = KVCache([KVLayer(2, 3, 5)] * 2, 2, 4, torch.float32, torch.device("cpu"))
    before = [torch.randn_like(keys) for keys in cache.keys]
    for keys, values in zip(cache.keys, before, strict=True):
        keys.copy_(values)
    cache.move([2, 3, 6], [1, 2, 3])
    for keys, old in zip(cache.keys, before, strict=True):
        assert torch.equal(keys[:, [1, 2, 3]], old[:, [2, 3, 6]])
        assert torch.equal(keys[:, [0, 4, 5, 6, 7]], old[:, [0, 4, 5, 6, 7]])


def test_a_tree_sees_ancestors_by_depth_and_window() -> None:
    table = BlockTable(4)
    table.extend([0, 1, 2, 3])
    tree = TreeMask.from_parents(5, [-1, -1, 0, 2])
    row = ForwardRow([10, 11, 12, 13, 14], 5, table, tree)
    assert list(row.positions) == [5, 6, 6, 7, 8]
    low, mask = RowSpan(row, 0, torch.device("cpu")).mask(3, torch.float32)
    assert low == 3
    assert mask is not None
    seen = [[low + i for i in range(mask.shape[1]) if mask[q, i] == 0] for q in range(5)]
    # entries 5.. are the root and the nodes; a window of 3 reaches positions p-2 … p
    assert seen == [[3, 4, 5], [4, 5, 6], [4, 5, 7], [5, 6, 8], [6, 8, 9]]


def make_request(number: int, length: int, max_tokens: int = 8, priority: int = 0) -> Request:
    randomness = RowRandomness(EngineRandomness(0, torch.device("cpu")), number, None)
    return Request(
        id=str(number),
        number=number,
        tokens=list(range(length)),
        num_prompt_tokens=length,
        params=SamplingParams(max_tokens=max_tokens),
        stop_ids=frozenset(),
        randomness=randomness,
        priority=priority,
    )


def advance(scheduler: Scheduler) -> list[tuple[str, int, bool]]:
    rows = scheduler.schedule()
    for row in rows:
        row.request.num_computed += row.num_tokens
        if row.samples:
            row.request.append([0], [None])
            if row.request.is_finished:
                scheduler.finish(row.request, "finished")
    return [(row.request.id, row.num_tokens, row.samples) for row in rows]


def test_long_prompts_go_in_chunks_beside_decoding_rows() -> None:
    scheduler = Scheduler(64, 4, max_num_seqs=4, max_num_batched_tokens=10, lookahead=0)
    scheduler.add(make_request(0, 3))
    scheduler.add(make_request(1, 25))
    assert advance(scheduler) == [("0", 3, True), ("1", 7, False)]
    assert advance(scheduler) == [("0", 1, True), ("1", 9, False)]
    assert advance(scheduler) == [("0", 1, True), ("1", 9, True)]
    assert advance(scheduler) == [("0", 1, True), ("1", 1, True)]


def test_a_short_prompt_does_not_wait_for_the_long_ones_before_it() -> None:
    scheduler = Scheduler(128, 4, max_num_seqs=8, max_num_batched_tokens=16, lookahead=0)
    for number in range(4):
        scheduler.add(make_request(number, 60))
    assert advance(scheduler) == [("0", 16, False)]
    scheduler.add(make_request(4, 3, max_tokens=2))
    scheduler.add(make_request(5, 2, max_tokens=2))
    assert advance(scheduler) == [("0", 12, False), ("4", 3, True), ("5", 1, False)]
    assert advance(scheduler) == [("0", 14, False), ("4", 1, True), ("5", 1, True)]
    assert advance(scheduler) == [("0", 15, False), ("5", 1, True)]
    assert advance(scheduler) == [("0", 3, True), ("1", 13, False)]


def test_a_stream_of_short_prompts_does_not_stop_a_long_one() -> None:
    scheduler = Scheduler(128, 4, max_num_seqs=8, max_num_batched_tokens=16, lookahead=0)
    scheduler.add(make_request(0, 120, max_tokens=1))
    for step in range(100):
        for number in range(3):
            scheduler.add(make_request(1 + 3 * step + number, 4, max_tokens=1))
        if any(samples and name == "0" for name, _, samples in advance(scheduler)):
            break
    assert step <= 120 // 12


def test_first_come_first_served_and_the_youngest_is_preempted() -> None:
    scheduler = Scheduler(6, 4, max_num_seqs=4, max_num_batched_tokens=64, lookahead=0)
    for number in range(3):
        scheduler.add(make_request(number, 7, max_tokens=12))
    order: list[str] = []
    for _ in range(200):
        if not scheduler.has_work:
            break
        for request_id, _, _ in advance(scheduler):
            if request_id not in order:
                order.append(request_id)
    assert order == ["0", "1", "2"]
    assert scheduler.num_preemptions > 0
    assert scheduler.allocator.num_free == 6
    reasons = [(request.id, reason) for request, _, reason in scheduler.ended]
    assert ("2", "preempted") in reasons or ("1", "preempted") in reasons
    assert [request_id for request_id, reason in reasons if reason == "finished"] == ["0", "1", "2"]


def test_lower_priorities_start_first_and_equal_ones_as_they_came() -> None:
    scheduler = Scheduler(64, 4, max_num_seqs=1, max_num_batched_tokens=16, lookahead=0)
    for number, priority in enumerate([0, 5, -1, 5, 0, -1]):
        scheduler.add(make_request(number, 3, max_tokens=2, priority=priority))
    order = [advance(scheduler)[0][0] for _ in range(12)]
    assert order[::2] == order[1::2] == ["2", "5", "0", "4", "1", "3"]


def test_a_short_prompt_of_a_higher_number_waits_for_the_long_one_before_it() -> None:
    scheduler = Scheduler(64, 4, max_num_seqs=4, max_num_batched_tokens=16, lookahead=0)
    scheduler.add(make_request(0, 30, priority=1))
    scheduler.add(make_request(1, 2, priority=2))
    assert advance(scheduler) == [("0", 16, False)]
    scheduler.add(make_request(2, 2, priority=1))
    assert advance(scheduler) == [("0", 14, True), ("2", 2, True)]
    assert advance(scheduler) == [("0", 1, True), ("2", 1, True), ("1", 2, True)]


def test_the_victim_is_the_latest_row_of_the_highest_number() -> None:
    scheduler = Scheduler(9, 4, max_num_seqs=4, max_num_batched_tokens=64, lookahead=0)
    for number, priority in enumerate([1, 2, 2, 1]):
        scheduler.add(make_request(number, 7, max_tokens=20, priority=priority))
    while scheduler.has_work:
        advance(scheduler)
    ended = [(request.id, reason) for request, _, reason in scheduler.ended]
    assert ended[:2] == [("2", "preempted"), ("1", "preempted")]
    assert [name for name, reason in ended if reason == "finished"] == ["0", "3", "1", "2"]
    assert scheduler.allocator.num_free == 9


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_ends(seed: int) -> None:
    chooser = random.Random(seed)
    scheduler = Scheduler(20, 4, max_num_seqs=3, max_num_batched_tokens=12, lookahead=3)
    waiting = [
        make_request(i, chooser.randint(1, 40), chooser.randint(1, 30), chooser.randint(0, seed)) for i in range(30)
    ]
    done = 0
    for _ in range(5000):
        if waiting and chooser.random() < 0.3:
            scheduler.add(waiting.pop())
        rows = advance(scheduler)
        assert sum(count for _, count, _ in rows) <= 12
        if chooser.random() < 0.01 and scheduler.running:
            victim = chooser.choice(scheduler.running)
            victim.finish_reason = "abort"
            scheduler.finish(victim, "aborted")
        done = sum(1 for _, _, reason in scheduler.ended if reason != "preempted")
        if done == 30:
            break
    assert done == 30
    assert scheduler.allocator.num_free == 20
