# ruff: noqa: N803 - constants of a kernel are named like constants
"""Attention of ragged rows over a paged KV cache for NVIDIA GPUs, trees included: one Triton kernel per layer.

Why not PyTorch's own: SDPA needs rows gathered, padded and masked, which doubles the traffic and cannot be captured once for
all lengths; flex attention pages, but compiles a mask per shape and knows no packed rows. This kernel reads the plan that CPUs
read (`model/attention/plan.py`), so the grid depends on nothing but the number of tokens, and one CUDA graph serves every batch
of that size. The cache is read once for all query heads that share it.

A *work item* is a block of one row's queries against a range of its KV entries; the plan's schedule cuts a batch into
items, so that a few long rows fill the GPU too. The parts of a block that was cut are merged by whichever program comes last:
no second launch, and always in the same order. New keys and values are read from where the model put them, and stored in
the cache on the way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_wait

from specplug.native.gpu.sizes import attention_sizes, num_programs, overlaps, shared_memory

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_tile(query, keys, values, seen, best, total, sums, scale, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    scores = tl.dot(query, keys, input_precision="ieee") * scale
    if HAS_SOFTCAP:
        scores = libdevice.tanh(scores / softcap) * softcap
    scores = tl.where(seen, scores * LOG2E, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    finite = tl.where(new_best == float("-inf"), 0.0, new_best)
    probs = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(best - finite)
    total = total * shrink + tl.sum(probs, 1)
    sums = sums * shrink[:, None] + tl.dot(probs.to(values.dtype), values, input_precision="ieee")
    return new_best, total, sums


@triton.jit
def _slots_of(plan, base, table, block_size, entries, is_there):  # type: ignore[no-untyped-def]
    paged = is_there & (base < 0)
    blocks = tl.load(plan + table + entries // block_size, mask=paged, other=0)
    return tl.where(base < 0, blocks * block_size + entries % block_size, base + entries).to(tl.int64)


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    query_at,
    key_at,
    value_at,
    keys_at,
    values_at,
    plan,
    write_slots,
    sinks,
    out,
    part_sums,
    part_stats,
    query_head,
    query_token,
    key_head,
    key_token,
    value_head,
    value_token,
    keys_head,
    values_head,
    heads,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUERIES: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    kv_head = share // CHUNKS
    chunk = share % CHUNKS
    block_size = tl.load(plan + 2)
    schedule = plan + tl.load(plan + 3)
    num_items = tl.load(schedule)
    lane = tl.arange(0, LANES)
    lane_query = lane // CHUNK
    lane_head = chunk * CHUNK + lane % CHUNK
    head = kv_head * GROUP + lane_head
    of_key = tl.arange(0, KEY_BLOCK)
    of_value = tl.arange(0, VALUE_BLOCK)
    keys_at += kv_head.to(tl.int64) * keys_head
    values_at += kv_head.to(tl.int64) * values_head
    key_at += kv_head.to(tl.int64) * key_head
    value_at += kv_head.to(tl.int64) * value_head
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        fields = schedule + 4 + item * 8
        row = plan + 4 + tl.load(fields) * 8
        first_query = tl.load(fields + 1)
        begin = tl.load(fields + 2)
        end = tl.load(fields + 3)
        parts = tl.load(fields + 4)
        part = tl.load(fields + 5)
        first_part = tl.load(fields + 6)
        counter = schedule + tl.load(fields + 7) + share
        packed = tl.load(row)
        count = tl.load(row + 1)
        length = tl.load(row + 2)
        base = tl.load(row + 3)
        table = tl.load(row + 4)
        tree = tl.load(row + 6)
        prefix = tl.load(row + 7)
        start = length - count
        tail = length - prefix
        words = (tail + 31) // 32
        is_tree = tree >= 0
        end = tl.minimum(end, tl.where(is_tree, length, start + tl.minimum(first_query + QUERIES, count)))
        if OVERLAPS:  # the plan is older than the kernel before this one, whose results are needed from here on
            gdc_wait()

        # the block's own new entries go into the cache; nobody reads them from there in this launch
        if (part == first_part) & (chunk == 0):
            own = first_query + tl.arange(0, QUERIES)
            is_own = own < count
            to = tl.load(write_slots + packed + own, mask=is_own, other=0)
            token = (packed + own).to(tl.int64)
            mask = is_own[:, None] & (of_key < KEY_DIM)[None, :]
            new_keys = tl.load(key_at + token[:, None] * key_token + of_key[None, :], mask=mask)
            tl.store(keys_at + to[:, None] * KEY_DIM + of_key[None, :], new_keys, mask=mask)
            mask = is_own[:, None] & (of_value < VALUE_DIM)[None, :]
            new_values = tl.load(value_at + token[:, None] * value_token + of_value[None, :], mask=mask)
            tl.store(values_at + to[:, None] * VALUE_DIM + of_value[None, :], new_values, mask=mask)

        at = first_query + lane_query
        is_lane = (lane_query < QUERIES) & (lane % CHUNK + chunk * CHUNK < GROUP) & (at < count)
        position = tl.load(plan + tree + (start - prefix) + at, mask=is_lane & is_tree, other=0)
        position = tl.where(is_tree, position, start + at)
        bits = plan + tree + tail + at * words
        where = head.to(tl.int64) * query_head + (packed + at).to(tl.int64) * query_token
        query = tl.load(
            query_at + where[:, None] + of_key[None, :],
            mask=is_lane[:, None] & (of_key < KEY_DIM)[None, :],
            other=0.0,
        )
        best = tl.full([LANES], float("-inf"), tl.float32)
        total = tl.zeros([LANES], tl.float32)
        sums = tl.zeros([LANES, VALUE_BLOCK], tl.float32)

        # committed entries: every query sees them, as far as its window reaches
        low = begin
        if HAS_WINDOW:
            oldest = tl.min(tl.where(is_lane, position, 2147483647), 0)
            low = tl.maximum(low, oldest + 1 - window)
        stop = tl.minimum(end, tl.minimum(start, prefix))
        for tile in tl.range(low, stop, TILE, num_stages=STAGES):
            entry = tile + tl.arange(0, TILE)
            is_there = entry < stop
            slot = _slots_of(plan, base, table, block_size, entry, is_there)
            keys = tl.load(
                keys_at + slot[None, :] * KEY_DIM + of_key[:, None],
                mask=is_there[None, :] & (of_key < KEY_DIM)[:, None],
                other=0.0,
            )
            values = tl.load(
                values_at + slot[:, None] * VALUE_DIM + of_value[None, :],
                mask=is_there[:, None] & (of_value < VALUE_DIM)[None, :],
                other=0.0,
            )
            seen = is_there[None, :] & is_lane[:, None]
            if HAS_WINDOW:
                seen = seen & (position[:, None] - entry[None, :] < window)
            best, total, sums = _add_tile(query, keys, values, seen, best, total, sums, scale, softcap, HAS_SOFTCAP)

        # entries of a tree that lie in the cache: as the tree's bits say
        stop = tl.minimum(end, start)
        for tile in tl.range(tl.maximum(begin, prefix), stop, TILE, num_stages=1):
            entry = tile + tl.arange(0, TILE)
            is_there = entry < stop
            slot = _slots_of(plan, base, table, block_size, entry, is_there)
            keys = tl.load(
                keys_at + slot[None, :] * KEY_DIM + of_key[:, None],
                mask=is_there[None, :] & (of_key < KEY_DIM)[:, None],
                other=0.0,
            )
            values = tl.load(
                values_at + slot[:, None] * VALUE_DIM + of_value[None, :],
                mask=is_there[:, None] & (of_value < VALUE_DIM)[None, :],
                other=0.0,
            )
            bit = entry - prefix
            asks = is_lane[:, None] & is_there[None, :]
            word = tl.load(bits[:, None] + (bit // 32)[None, :], mask=asks, other=0)
            seen = asks & (((word >> (bit % 32)[None, :]) & 1) != 0)
            if HAS_WINDOW:
                depth = tl.load(plan + tree + bit, mask=is_there, other=0)
                seen = seen & (position[:, None] - depth[None, :] < window)
            best, total, sums = _add_tile(query, keys, values, seen, best, total, sums, scale, softcap, HAS_SOFTCAP)

        # new entries, from where the model put them: causal, or as the tree's bits say
        low = tl.maximum(begin, start)
        if HAS_WINDOW:
            oldest = tl.min(tl.where(is_lane, position, 2147483647), 0)
            low = tl.where(is_tree, low, tl.maximum(low, oldest + 1 - window))
        for tile in tl.range(low, end, TILE, num_stages=STAGES):
            entry = tile + tl.arange(0, TILE)
            is_there = entry < end
            token = (packed + entry - start).to(tl.int64)
            keys = tl.load(
                key_at + token[None, :] * key_token + of_key[:, None],
                mask=is_there[None, :] & (of_key < KEY_DIM)[:, None],
                other=0.0,
            )
            values = tl.load(
                value_at + token[:, None] * value_token + of_value[None, :],
                mask=is_there[:, None] & (of_value < VALUE_DIM)[None, :],
                other=0.0,
            )
            bit = entry - prefix
            asks = is_lane[:, None] & is_there[None, :]
            word = tl.load(bits[:, None] + (bit // 32)[None, :], mask=asks & is_tree, other=0)
            in_tree = ((word >> (bit % 32)[None, :]) & 1) != 0
            seen = asks & ((is_tree & in_tree) | ((tree < 0) & (entry[None, :] <= position[:, None])))
            if HAS_WINDOW:
                depth = tl.load(plan + tree + bit, mask=is_there & is_tree, other=0)
                depth = tl.where(is_tree, depth, entry)
                seen = seen & (position[:, None] - depth[None, :] < window)
            best, total, sums = _add_tile(query, keys, values, seen, best, total, sums, scale, softcap, HAS_SOFTCAP)

        is_last = 1
        if parts > 1:
            cell = ((part * shares + share) * LANES + lane).to(tl.int64)
            tl.store(part_stats + cell * 2, best)
            tl.store(part_stats + cell * 2 + 1, total)
            tl.store(part_sums + cell[:, None] * VALUE_BLOCK + of_value[None, :], sums, mask=is_lane[:, None])
            tl.debug_barrier()  # all of this program's stores, then the count
            before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            is_last = (before == parts - 1).to(tl.int32)
            if is_last == 1:
                tl.debug_barrier()
                tl.store(counter, 0)  # ready for the next layer
                best = tl.full([LANES], float("-inf"), tl.float32)
                total = tl.zeros([LANES], tl.float32)
                sums = tl.zeros([LANES, VALUE_BLOCK], tl.float32)
                for other in tl.range(first_part, first_part + parts, loop_unroll_factor=4):
                    cell = ((other * shares + share) * LANES + lane).to(tl.int64)
                    its_best = tl.load(part_stats + cell * 2, cache_modifier=".cg")
                    its_total = tl.load(part_stats + cell * 2 + 1, cache_modifier=".cg")
                    its_sums = tl.load(
                        part_sums + cell[:, None] * VALUE_BLOCK + of_value[None, :],
                        mask=is_lane[:, None],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    new_best = tl.maximum(best, its_best)
                    finite = tl.where(new_best == float("-inf"), 0.0, new_best)
                    ours, theirs = tl.exp2(best - finite), tl.exp2(its_best - finite)
                    total = total * ours + its_total * theirs
                    sums = sums * ours[:, None] + its_sums * theirs[:, None]
                    best = new_best
        if is_last == 1:
            if HAS_SINKS:
                sink = tl.load(sinks + head, mask=is_lane, other=0.0).to(tl.float32) * LOG2E
                new_best = tl.maximum(best, sink)
                shrink = tl.exp2(best - new_best)
                total = total * shrink + tl.exp2(sink - new_best)
                sums = sums * shrink[:, None]
            result = sums * tl.where(total > 0, 1.0 / total, 0.0)[:, None]
            to = ((packed + at).to(tl.int64) * heads + head) * VALUE_DIM
            tl.store(
                out + to[:, None] + of_value[None, :],
                result.to(out.dtype.element_ty),
                mask=is_lane[:, None] & (of_value < VALUE_DIM)[None, :],
            )
    if OVERLAPS:
        gdc_wait()  # a program without items waits too: who follows relies on it


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: torch.Tensor,
    slots: torch.Tensor,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See `specplug::attend` in `operators.py`; `plan` ends with a schedule."""
    query, key, value = _dense(query), _dense(key), _dense(value)
    heads, tokens = query.shape[1], query.shape[2]
    kv_heads = keys.shape[0]
    device = query.device
    sizes = attention_sizes(
        tokens, heads // kv_heads, kv_heads, keys.shape[2], values.shape[2], query.dtype, shared_memory(device)
    )
    shares = kv_heads * sizes.chunks
    grid, most_parts = num_programs(tokens, len(plan), kv_heads, shares, device)
    out = query.new_empty(1, tokens, heads, values.shape[2])
    cells = most_parts * shares * sizes.lanes
    part_sums = torch.empty(cells * sizes.value_block, dtype=torch.float32, device=device)
    part_stats = torch.empty(cells * 2, dtype=torch.float32, device=device)
    launch: Any = _attend_kernel[(grid, shares)]
    with torch.cuda.device(device):
        launch(
            query,
            key,
            value,
            keys,
            values,
            plan,
            slots,
            query if sinks is None else sinks,
            out,
            part_sums,
            part_stats,
            query.stride(1),
            query.stride(2),
            key.stride(1),
            key.stride(2),
            value.stride(1),
            value.stride(2),
            keys.stride(0),
            values.stride(0),
            heads,
            scaling,
            window,
            softcap,
            GROUP=heads // kv_heads,
            CHUNK=sizes.chunk,
            CHUNKS=sizes.chunks,
            QUERIES=sizes.queries,
            LANES=sizes.lanes,
            TILE=sizes.tile,
            KEY_DIM=keys.shape[2],
            VALUE_DIM=values.shape[2],
            KEY_BLOCK=sizes.key_block,
            VALUE_BLOCK=sizes.value_block,
            HAS_WINDOW=window > 0,
            HAS_SOFTCAP=softcap > 0,
            HAS_SINKS=sinks is not None,
            STAGES=sizes.stages,
            OVERLAPS=overlaps(device),
            num_warps=sizes.warps,
            launch_pdl=overlaps(device),
        )
    return out


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last dimension dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
