"""Chooses the rows of each step and allocates their KV blocks. Does not know models or speculators.

First come, first served, but short prompts have a quarter of the tokens that a step has for prompts: they do not wait for all
the long ones before them. A row's pending tokens (one while decoding, a chunk while prefilling) and its draft share one token
budget per step. When blocks run out, unused reservations are released first. Then the youngest row is preempted: it releases
its blocks and is recomputed later.

All that holds among requests of one priority. Those with a lower number come before all others, and are preempted last.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING

import attrs

from specplug.contract.types import EndReason
from specplug.engine.prefix_cache import NO_HIT, PrefixCache
from specplug.model.kv_cache import BlockAllocator, BlockTable
from specplug.request import Request

if TYPE_CHECKING:
    from specplug.speculation.draft import Draft

_SHORT = 4
"""A prompt that fits into this part of a step is short, and short ones have this part of a step to themselves."""
_PRIORITY = attrgetter("priority")
_MOST_LOOKED_AT = 256  # waiting requests among which short ones are looked for


@attrs.define(eq=False)  # several per row and step: frozen takes twice as long
class ScheduledRow:
    """One row of a step.

    Attributes:
        request: the row's request.
        num_tokens: the number of its pending tokens that run.
        samples: whether all of them run, so that the row produces a token.
    """

    request: Request
    num_tokens: int
    samples: bool


class Scheduler:
    """The waiting queue, the running rows, their slots and blocks.

    Args:
        num_blocks: KV blocks.
        block_size: tokens of a block.
        max_num_seqs: the most rows in a batch.
        max_num_batched_tokens: the most tokens in a step.
        lookahead: KV entries of a row after its tokens.
        max_model_len: the longest sequence, if it is known.
        prefix_cache: where new rows look for the KV of their first tokens; None computes all of them.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        lookahead: int,
        max_model_len: int | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.prefix_cache = prefix_cache
        self.allocator = BlockAllocator(num_blocks)
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.lookahead = lookahead
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.ended: list[tuple[Request, int, EndReason]] = []
        self.num_preemptions = 0
        share = 0 if max_model_len is None else self._blocks_for(max_model_len + lookahead)
        self._equal_share = share if share * max_num_seqs <= num_blocks else 0
        self._free_slots = list(range(max_num_seqs))

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def requests(self) -> Iterator[Request]:
        """All unfinished requests, including those not forked yet."""
        for request in (*self.running, *self.waiting):
            yield request
            yield from request.fork_group

    def add(self, request: Request) -> None:
        """Queues a request after those of its priority."""
        self.waiting.insert(bisect_right(self.waiting, request.priority, key=_PRIORITY), request)

    def schedule(self) -> list[ScheduledRow]:
        """Chooses the rows of the next step and allocates blocks for their tokens."""
        rows: list[ScheduledRow] = []
        budget = self.max_num_batched_tokens
        kept: int | None = None  # tokens for short prompts, decided where the first long one needs some
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            count = min(request.num_pending, budget)
            if count > 1:
                left = budget - sum(map(self._needs, self.running[index + 1 :]))
                least = 1 if kept is None else 0
                kept = self._kept_for_short(left, request.priority) if kept is None else kept
                count = min(count, max(left - kept, least))
                if count == 0:
                    index += 1
                    continue
            whole = count == request.num_pending
            if not whole or not self._fits(request.draft, budget - count):
                request.draft = None
            drafts = len(request.draft) if request.draft else 0
            if not self._make_room(request, request.num_computed + count + drafts):
                break  # it was the youngest row, and preempted itself
            rows.append(ScheduledRow(request, count, whole))
            budget -= count + drafts
            index += 1
        if index == len(self.running):
            self._admit(rows, budget, kept)
        return rows

    def _needs(self, request: Request) -> int:
        """How many tokens a long prompt leaves to a row that started after it."""
        if request.num_pending == 1:
            return 1 if request.draft is None else 1 + max(len(request.draft), request.draft.allowed)
        return request.num_pending if self._is_short(request) else 0

    def _is_short(self, request: Request) -> bool:
        return len(request.tokens) <= self.max_num_batched_tokens // _SHORT

    def _waiting_short(self, priority: int) -> list[Request]:
        """Short prompts that wait, of a priority or an earlier one."""
        first = islice(self.waiting, _MOST_LOOKED_AT)
        return [request for request in first if request.priority <= priority and self._is_short(request)]

    def _kept_for_short(self, budget: int, priority: int) -> int:
        """How many of a step's tokens a long prompt leaves to short ones that wait."""
        if not self._free_slots:
            return 0
        return min(sum(len(request.tokens) for request in self._waiting_short(priority)), max(0, budget) // _SHORT)

    def continue_rows(self) -> list[ScheduledRow] | None:
        """The rows of the next step while their tokens are in flight: those that have one, and may have another after it.

        Returns:
            None if more is to be decided than that: a request can be admitted, a prompt goes on, or blocks are short.
        """
        if self.waiting and self._free_slots:
            return None
        rows = []
        for request in self.running:
            if request.is_ending:
                continue
            if request.num_pending > 1 or not self.reserve(request, request.num_computed + 1):
                return None
            rows.append(ScheduledRow(request, 1, True))
        return rows

    @staticmethod
    def _fits(draft: Draft | None, budget: int) -> bool:
        """Whether the token budget has room for a draft, which may have been proposed for an earlier step.

        The draft's budget counts, not its length: the length may depend on the tokens that were sampled for it.
        """
        return draft is None or max(len(draft), draft.allowed) <= budget

    def _admit(self, rows: list[ScheduledRow], budget: int, kept: int | None) -> None:
        """Starts waiting requests in their order while there are tokens; then short ones, for which `kept` tokens are left."""
        while self.waiting and self._free_slots and budget > 0:
            request = self.waiting[0]
            most = budget
            if not self._is_short(request):
                kept = self._kept_for_short(budget, request.priority) if kept is None else kept
                most = budget - kept
            if most <= 0:
                break
            count = self._try_to_start(request, most, rows)
            if count == 0:
                return  # it waits for blocks, which those after it must not take
            budget -= count
            if kept is not None and self._is_short(request):
                kept = max(0, kept - count)
        if not (kept and self.waiting):
            return
        for request in self._waiting_short(self.waiting[0].priority):
            if budget <= 0 or not self._free_slots:
                return
            count = self._try_to_start(request, budget, rows)
            if count == 0:
                return
            budget -= count

    def _try_to_start(self, request: Request, most: int, rows: list[ScheduledRow]) -> int:
        """Gives a waiting request its blocks and up to `most` tokens of a step; returns how many, 0 if blocks are missing."""
        hit = NO_HIT if self.prefix_cache is None else self.prefix_cache.find(request, self.allocator)
        found = len(hit.blocks)
        needed = self._blocks_for(len(request.tokens) + 1) - found
        if needed > self.allocator.num_free - self.allocator.count_free(hit.blocks):
            return 0
        self.allocator.share(hit.blocks)
        request.num_computed = found * self.block_size
        count = min(request.num_pending, most)
        blocks = self.allocator.allocate(
            self._blocks_for(request.num_computed + count) - found,
            after=hit.blocks[-1] if found else None,
            expected=max(needed, self._expected_blocks(request) - found),
        )
        assert blocks is not None
        table = BlockTable(self.block_size)
        table.extend([*hit.blocks, *blocks])
        self.waiting.remove(request)
        request.num_stored_blocks = found
        request.stored_by = dict(hit.starts)
        if self.prefix_cache is not None:
            self.prefix_cache.count(request, hit)
        self._start(request, table)
        rows.append(ScheduledRow(request, count, count == request.num_pending))
        return count

    def _start(self, request: Request, table: BlockTable) -> None:
        request.table = table
        request.slot = heapq.heappop(self._free_slots)
        self.running.insert(bisect_right(self.running, request.priority, key=_PRIORITY), request)

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Grows a row's block table to `num_tokens`, if blocks are free; never preempts."""
        table = request.table
        assert table is not None
        missing = self._blocks_for(num_tokens) - len(table.blocks)
        if missing <= 0:
            return True
        last = table.blocks[-1] if table.blocks else None
        blocks = self.allocator.allocate(missing, after=last)
        if blocks is None:
            return False
        table.extend(blocks)
        return True

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Grows a row's block table. Releases reservations, then preempts the youngest rows; False if that was this row."""
        if self.reserve(request, num_tokens):
            return True
        self._reclaim()
        while not self.reserve(request, num_tokens):
            victim = self.running[-1]
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def _reclaim(self) -> None:
        """Releases blocks that are reserved for drafts and scratch entries and not in use."""
        for request in self.running:
            table = request.table
            assert table is not None
            drafts = len(request.draft) if request.draft else 0
            in_use = self._blocks_for(len(request.tokens) + drafts)
            self.allocator.release(table.truncate(in_use))

    def preempt(self, request: Request) -> None:
        """Releases a running row's slot and blocks; it is recomputed before others of its priority."""
        self.num_preemptions += 1
        self._leave(request, "preempted")
        request.num_computed = 0
        request.draft = None
        request.outcome = None
        self.waiting.insert(bisect_left(self.waiting, request.priority, key=_PRIORITY), request)

    def finish(self, request: Request, reason: EndReason) -> None:
        """Removes a request, running or waiting."""
        if request.slot >= 0:
            self._leave(request, reason)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _leave(self, request: Request, reason: EndReason) -> None:
        assert request.table is not None
        self.ended.append((request, request.slot, reason))
        self.allocator.release(request.table.blocks, claimed=self._expected_blocks(request))
        heapq.heappush(self._free_slots, request.slot)
        self.running.remove(request)
        request.slot = -1
        request.table = None
        request.in_flight = None
        request.forked_from = None
        request.num_forked_tokens = 0
        request.num_stored_blocks = 0
        request.num_followed_blocks = {}
        request.stored_by = {}

    def fork(self, parent: Request, child: Request) -> list[tuple[int, int]] | None:
        """Starts a sequence on the computed prompt of another one. Full blocks are shared, the last one is copied.

        Returns:
            (source, destination) slots of KV entries to copy; None if no row slot or block is free.
        """
        table = parent.table
        assert table is not None
        computed = min(parent.num_computed, len(child.tokens) - 1)
        shared = computed // self.block_size
        if not self._free_slots:
            return None
        own = self.allocator.allocate(
            self._blocks_for(computed + 1) - shared, expected=self._expected_blocks(child) - shared
        )
        if own is None:
            return None
        forked = BlockTable(self.block_size)
        self.allocator.share(table.blocks[:shared])
        forked.extend([*table.blocks[:shared], *own])
        child.num_computed = child.num_forked_tokens = computed
        child.forked_from = parent.slot
        child.num_stored_blocks = min(shared, parent.num_stored_blocks)
        child.block_digests = parent.block_digests[:shared]
        self._start(child, forked)
        first = shared * self.block_size
        return list(zip(table.slots(first, computed), forked.slots(first, computed), strict=True))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _expected_blocks(self, request: Request) -> int:
        """The most blocks a request can need. If every row can have the maximum, all rows get equal shares."""
        if self._equal_share:
            return self._equal_share
        assert request.params.max_tokens is not None
        return self._blocks_for(request.num_prompt_tokens + request.params.max_tokens + self.lookahead)
