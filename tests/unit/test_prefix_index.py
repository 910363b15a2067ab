"""Cached blocks: found by their tokens, shared while they are held, evicted in the order of their last use."""

from __future__ import annotations

from array import array
from hashlib import sha256

import pytest
import torch

from specplug import SamplingParams
from specplug.engine.prefix_cache import PrefixCache, Sharer
from specplug.engine.scheduler import Scheduler
from specplug.model.kv_cache import BlockAllocator, BlockTable
from specplug.request import Request
from specplug.sampling.randomness import EngineRandomness, RowRandomness

SIZE = 4


def make_request(tokens: list[int], salt: str | None = None, prompt_logprobs: int | None = None) -> Request:
    return Request(
        id="r",
        number=0,
        tokens=list(tokens),
        num_prompt_tokens=len(tokens),
        params=SamplingParams(max_tokens=8, prompt_logprobs=prompt_logprobs),
        stop_ids=frozenset(),
        randomness=RowRandomness(EngineRandomness(0, torch.device("cpu")), 0, None),
        cache_salt=salt,
    )


def computed(cache: PrefixCache, allocator: BlockAllocator, tokens: list[int], salt: str | None = None) -> Request:
    """A row whose tokens are all computed and cached."""
    request = make_request([*tokens, 0], salt)
    request.table = BlockTable(SIZE)
    request.table.extend(allocator.allocate(-(-len(request.tokens) // SIZE)) or [])
    request.num_computed = len(tokens)
    cache.store([request], allocator)
    return request


def found(cache: PrefixCache, allocator: BlockAllocator, tokens: list[int], salt: str | None = None) -> int:
    return len(cache.find(make_request(tokens, salt), allocator).blocks)


def test_the_least_recently_used_block_goes_first_and_of_a_row_its_last() -> None:
    allocator, cache = BlockAllocator(8), PrefixCache(SIZE)
    first, second = (computed(cache, allocator, [number] * 12) for number in (1, 2))
    for request in (first, second):
        assert request.table is not None
        allocator.release(request.table.blocks)
    assert (allocator.num_free, allocator.cached.num_idle) == (8, 6)
    assert allocator.allocate(3) is not None  # two that were never cached, and one of the first row
    assert [found(cache, allocator, [number] * 13) for number in (1, 2)] == [2, 3]
    hit = cache.find(make_request([1] * 13), allocator).blocks
    allocator.share(hit)
    allocator.release(hit)  # used later than the second row now
    assert allocator.allocate(3) is not None
    assert [found(cache, allocator, [number] * 13) for number in (1, 2)] == [2, 0]
    assert allocator.num_free == 2
    assert allocator.allocate(3) is None


def test_blocks_that_a_row_holds_are_never_evicted() -> None:
    allocator, cache = BlockAllocator(6), PrefixCache(SIZE)
    owner = computed(cache, allocator, [1] * 8)
    hit = cache.find(make_request([1] * 9), allocator).blocks
    assert owner.table is not None
    assert hit == owner.table.blocks[:2]
    allocator.share(hit)
    allocator.release(owner.table.blocks)
    assert allocator.allocate(5) is None
    assert set(allocator.allocate(4) or []).isdisjoint(hit)
    allocator.release(hit)
    assert found(cache, allocator, [1] * 9) == 2


@pytest.mark.parametrize("tokens", [[1] * 8, [1] * 9, [1] * 11])
def test_the_last_token_is_always_computed(tokens: list[int]) -> None:
    allocator, cache = BlockAllocator(9), PrefixCache(SIZE)
    computed(cache, allocator, [1] * 16)
    assert found(cache, allocator, tokens) == (len(tokens) - 1) // SIZE


def test_tokens_whose_log_probabilities_are_missing_are_computed() -> None:
    allocator, cache = BlockAllocator(9), PrefixCache(SIZE)
    computed(cache, allocator, [1] * 16)
    request = make_request([1] * 16, prompt_logprobs=0)
    assert cache.find(request, allocator).blocks == []
    request.prompt_logprobs = [{}] * 9  # preempted after that
    assert len(cache.find(request, allocator).blocks) == 2
    request.prompt_logprobs = [{}] * 15
    assert len(cache.find(request, allocator).blocks) == 3


def test_only_the_same_tokens_after_the_same_tokens_with_the_same_salt_are_found() -> None:
    allocator, cache = BlockAllocator(40), PrefixCache(SIZE)
    computed(cache, allocator, [1, 2, 3, 4, 5, 6, 7, 8])
    computed(cache, allocator, [1, 2, 3, 4, 5, 6, 7, 8], "tenant")
    assert found(cache, allocator, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 2
    assert found(cache, allocator, [1, 2, 3, 4, 5, 6, 7, 9, 9]) == 1
    assert found(cache, allocator, [5, 6, 7, 8, 9]) == 0
    assert found(cache, allocator, [1, 2, 3, 4, 5], "another") == 0
    (one,) = cache.find(make_request([1, 2, 3, 4, 5]), allocator).blocks
    (other,) = cache.find(make_request([1, 2, 3, 4, 5], "tenant"), allocator).blocks
    assert one != other


def test_values_of_one_python_hash_are_not_the_same() -> None:
    allocator, cache = BlockAllocator(40), PrefixCache(SIZE)
    modulus = (1 << 61) - 1
    assert hash(1) == hash(1 + modulus)
    computed(cache, allocator, [1, 1, 1, 1])
    assert found(cache, allocator, [1 + modulus, 1, 1, 1, 1]) == 0


def test_a_salt_cannot_stand_for_a_block() -> None:
    """A salt that spells what a block's digest is made of does not make a second block look like a first one."""
    allocator, cache = BlockAllocator(40), PrefixCache(SIZE)
    computed(cache, allocator, [1, 2, 3, 4, 5, 6, 7, 8])
    root = sha256(b"").digest()
    for tag in (b"", b"B", b"S"):
        salt = (tag + root + array("q", [1, 2, 3, 4]).tobytes()).decode("latin-1")
        assert found(cache, allocator, [5, 6, 7, 8, 9], salt) == 0


@pytest.mark.parametrize("reads", [False, True], ids=["a draft model", "a head"])
def test_entries_of_speculators_are_found_as_far_as_they_were_written(reads: bool) -> None:
    allocator, cache = BlockAllocator(64), PrefixCache(SIZE, [Sharer(1, needs_states=reads)])
    owner = computed(cache, allocator, list(range(100, 140)))
    tokens = [*range(100, 140), 0]
    assert cache.find(make_request(tokens), allocator).starts == {1: 0}
    cache.store_entries([owner], allocator, lambda index, request: 30)
    hit = cache.find(make_request(tokens), allocator)
    if reads:  # the last blocks are computed anew, for their states
        assert (len(hit.blocks), hit.starts) == (7, {1: 28})
    else:
        assert (len(hit.blocks), hit.starts) == (10, {1: 28})
    cache.store_entries([owner], allocator, lambda index, request: 40)
    assert (len(hit.blocks), cache.find(make_request(tokens), allocator).starts) == (len(hit.blocks), {1: 40})
    hit = cache.find(
        make_request([*range(100, 140), 7]), allocator
    )  # the last entry of a head was made for another token
    assert (len(hit.blocks), hit.starts) == ((9, {1: 36}) if reads else (10, {1: 40}))


def test_the_same_prompt_twice_is_cached_once() -> None:
    allocator, cache = BlockAllocator(20), PrefixCache(SIZE)
    rows = [computed(cache, allocator, [3] * 8) for _ in range(2)]
    assert len(allocator.cached) == 2
    for row in rows:
        assert row.table is not None
        allocator.release(row.table.blocks)
    assert (allocator.num_free, allocator.cached.num_idle) == (20, 2)
    allocator.forget(allocator.cached.all())
    assert (allocator.num_free, allocator.cached.num_idle) == (20, 0)
    assert allocator.allocate(20) == list(range(20))


def test_a_preempted_row_finds_its_own_blocks() -> None:
    scheduler = Scheduler(8, SIZE, 2, 64, 0, prefix_cache=PrefixCache(SIZE))
    request = make_request(list(range(18)))
    scheduler.add(request)
    scheduler.schedule()
    request.num_computed = 18
    request.append([5], [None])
    assert scheduler.prefix_cache is not None
    scheduler.prefix_cache.store([request], scheduler.allocator)
    assert request.table is not None
    blocks = request.table.blocks[:4]
    scheduler.preempt(request)
    assert request.num_computed == 0
    (row,) = scheduler.schedule()
    assert (row.num_tokens, row.samples) == (3, True)
    assert request.table.blocks[:4] == blocks
    assert request.num_cached_tokens == 0  # what it found when it first started
    scheduler.finish(request, "finished")
    assert scheduler.allocator.num_free == 8
