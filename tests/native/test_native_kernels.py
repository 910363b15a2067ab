"""Native attention and matmuls equal PyTorch's, for every shape of batch."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from specplug import LLM, native
from specplug.contract.resources import KVLayer
from specplug.model.attention.interface import AttentionSite
from specplug.model.batch import ForwardBatch
from specplug.model.kv_cache import BlockTable, KVCache
from specplug.model.load.packing import packed_shape
from specplug.model.rows import ForwardRow, TreeMask
from specplug.native.operators import JOINED
from support.kernel_rows import BLOCK, BLOCKS, random_row

NATIVE = native.load()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (32, 96), (20, 24), (24, 20), (40, 72), (128, 128)])
@pytest.mark.parametrize(("window", "softcap", "sinks"), [(None, None, False), (9, None, False), (40, 5.0, True)])
def test_attention_equals_pytorch(
    dtype: torch.dtype, key_dim: int, value_dim: int, window: int | None, softcap: float | None, sinks: bool
) -> None:
    assert NATIVE, "this machine was expected to have a C++ compiler"
    heads, kv_heads = 6, 2
    for seed in range(8):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        cache = KVCache([KVLayer(kv_heads, key_dim, value_dim)], BLOCKS, BLOCK, dtype, torch.device("cpu"))
        cache.keys[0].normal_()
        cache.values[0].normal_()
        free = list(range(BLOCKS)) if seed % 2 else rng.permutation(BLOCKS).tolist()
        kinds = rng.choice(["decode", "prefill", "tree", "deep tree"], size=int(rng.integers(1, 4)))
        rows = [random_row(rng, free, kind) for kind in kinds]
        total = sum(len(row.tokens) for row in rows)
        query = torch.randn(1, total, heads, key_dim, dtype=dtype).transpose(1, 2)
        key = torch.randn(1, total, kv_heads, key_dim, dtype=dtype).transpose(1, 2)
        value = torch.randn(1, kv_heads, total, value_dim, dtype=dtype)
        extra = torch.randn(heads, dtype=dtype) if sinks else None
        results = []
        for is_native in (True, False):
            own = KVCache([KVLayer(kv_heads, key_dim, value_dim)], BLOCKS, BLOCK, dtype, torch.device("cpu"))
            own.keys[0].copy_(cache.keys[0])
            own.values[0].copy_(cache.values[0])
            site = AttentionSite(own.keys[0], own.values[0])
            site.batch = ForwardBatch(rows, own)
            site.batch.is_native = is_native
            attended = site.attend(query, key, value, key_dim**-0.5, window, softcap, extra)
            results.append((attended, own.keys[0], own.values[0]))
        (ours, *our_cache), (theirs, *their_cache) = results
        assert all(torch.equal(a, b) for a, b in zip(our_cache, their_cache, strict=True))
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def attend_long_rows(is_native: bool, dtype: torch.dtype, window: int | None, sinks: bool) -> torch.Tensor:
    """A decoding row that is cut into ranges, a short one, a tree behind a long prefix, and a prompt; one KV head of three."""
    torch.manual_seed(0)
    cache = KVCache([KVLayer(1, 32, 32)], 900, BLOCK, dtype, torch.device("cpu"))
    cache.keys[0].normal_()
    cache.values[0].normal_()
    free = list(range(900))
    rows = []
    for start, count, tree, first in [
        (2999, 1, None, 0),
        (15, 1, None, 0),
        (1530, 30, TreeMask.from_parents(1530, [-1, 0, -1] + [2] * 26), 0),
        (700, 40, None, 600),
        (1023, 2, None, 0),
    ]:
        table = BlockTable(BLOCK)
        table.extend([free.pop() for _ in range(-(-(start + count) // BLOCK))])
        rows.append(ForwardRow([0] * count, start, table, tree, first=first))
    total = sum(len(row.tokens) for row in rows)
    query, key, value = (torch.randn(1, heads, total, 32, dtype=dtype) for heads in (3, 1, 1))
    site = AttentionSite(cache.keys[0], cache.values[0])
    site.batch = ForwardBatch(rows, cache)
    site.batch.is_native = is_native
    return site.attend(query, key, value, 32**-0.5, window, None, torch.randn(3, dtype=dtype) if sinks else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1100])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_are_cut_into_ranges(dtype: torch.dtype, window: int | None, sinks: bool) -> None:
    """The same as PyTorch's, and bit for bit the same with any number of threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attend_long_rows(True, dtype, window, sinks))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    expected = attend_long_rows(False, dtype, window, sinks)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results[0], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dim", [24, 32, 64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("heads", range(1, 10))
def test_any_number_of_queries_of_a_decoding_row(heads: int, dim: int) -> None:
    """Up to eight per KV head go through the cache in the order in which it lies; what no entry uses is not looked at."""
    torch.manual_seed(heads)
    for length in (1, 2, 15, 16, 33, 130):
        cache = KVCache([KVLayer(1, dim, dim)], 20, BLOCK, torch.bfloat16, torch.device("cpu"))
        cache.keys[0].fill_(float("nan"))
        cache.values[0].fill_(float("nan"))
        for tensor in (cache.keys[0], cache.values[0]):
            tensor.view(-1, dim)[: length - 1].normal_()
        table = BlockTable(BLOCK)
        table.extend(range(-(-length // BLOCK)))
        query, key, value = (torch.randn(1, n, 1, dim, dtype=torch.bfloat16) for n in (heads, 1, 1))
        results = []
        for is_native in (True, False):
            site = AttentionSite(cache.keys[0], cache.values[0])
            site.batch = ForwardBatch([ForwardRow([0], length - 1, table)], cache)
            site.batch.is_native = is_native
            results.append(site.attend(query, key, value, dim**-0.5, None, None, None))
        torch.testing.assert_close(*results, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_with_its_query(dtype: torch.dtype) -> None:
    """A broken model says so, and the rows beside it are served."""
    torch.manual_seed(0)
    cache = KVCache([KVLayer(1, 64, 64)], 40, BLOCK, dtype, torch.device("cpu"))
    cache.keys[0].normal_()
    cache.values[0].normal_()
    query, key, value = (torch.randn(1, heads, 3, 64, dtype=dtype) for heads in (4, 1, 1))
    query[0, 2, 1, 7] = float("nan")
    table = BlockTable(BLOCK)
    table.extend(range(40))
    site = AttentionSite(cache.keys[0], cache.values[0])
    site.batch = ForwardBatch([ForwardRow([0] * 3, 200, table)], cache)
    site.batch.is_native = True
    attended = site.attend(query, key, value, 0.125, None, None, None)[0]  # [tokens, heads, dim]
    assert attended[1, 2].isnan().all()
    attended[1, 2] = 0.0
    assert attended.isfinite().all()


def test_a_range_more_or_less_changes_nothing_for_a_query() -> None:
    """Where a row is cut depends on its entries' numbers: a longer draft leaves its first query bit for bit as it is."""
    cache = KVCache([KVLayer(1, 32, 32)], 200, BLOCK, torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    cache.keys[0].normal_()
    cache.values[0].normal_()
    query, key, value = (torch.randn(1, heads, 9, 32) for heads in (3, 1, 1))
    table = BlockTable(BLOCK)
    table.extend(range(200))
    results = []
    for count in (1, 4, 9):  # entries up to 1021, 1024 and 1029
        batch = ForwardBatch([ForwardRow([0] * count, 1020, table)], cache)
        site = AttentionSite(cache.keys[0], cache.values[0])
        site.batch = batch
        results.append(site.attend(query[:, :, :count], key[:, :, :count], value[:, :, :count], 1.0, None, None, None))
    assert all(torch.equal(results[0][:, 0], other[:, 0]) for other in results[1:])


@pytest.mark.engine
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (32, 96), (40, 24), (128, 128)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_prompt_attends_as_its_tokens_would(key_dim: int, value_dim: int, softcap: float | None) -> None:
    """Bit for bit: whatever is computed together, however it is arranged for that."""
    torch.manual_seed(0)
    heads, kv_heads, length = 16, 2, 1024  # longer rows are cut into ranges when they decode
    cache = KVCache([KVLayer(kv_heads, key_dim, value_dim)], 200, BLOCK, torch.bfloat16, torch.device("cpu"))
    query = torch.randn(1, heads, length, key_dim, dtype=torch.bfloat16)
    key = torch.randn(1, kv_heads, length, key_dim, dtype=torch.bfloat16)
    value = torch.randn(1, kv_heads, length, value_dim, dtype=torch.bfloat16)
    site = AttentionSite(cache.keys[0], cache.values[0])
    table = BlockTable(BLOCK)
    table.extend(torch.randperm(200)[: -(-length // BLOCK)].tolist())

    def attend(first: int, last: int) -> torch.Tensor:
        site.batch = ForwardBatch([ForwardRow([0] * (last - first), first, table)], cache)
        site.batch.is_native = True
        parts = (part[:, :, first:last] for part in (query, key, value))
        return site.attend(*parts, key_dim**-0.5, None, softcap, None)[0]

    whole = attend(0, length)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 40):  # which take more or fewer queries together
            torch.set_num_threads(threads)
            assert torch.equal(attend(0, length), whole), threads
    finally:
        torch.set_num_threads(before)
    for first, last in [
        (0, 1),
        (63, 64),
        (64, 65),
        (900, 901),
        (900, 906),
        (895, 929),
        (400, 700),
        (0, 640),
        (1022, 1024),
    ]:
        assert torch.equal(attend(first, last), whole[first:last]), (first, last)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 14, 15, 29, 70, 113, 230, 600])
@pytest.mark.parametrize(
    ("inner", "outers"), [(64, (32, 96, 7)), (352, (100, 320)), (30, (5, 64)), (2, (1,)), (4200, (40,))]
)
def test_products_equal_pytorch(rows: int, inner: int, outers: tuple[int, ...], bias: bool) -> None:
    is_lowered = "CXX" in os.environ  # built for less than this machine has: see test_instruction_sets
    assert native.packs_bfloat16() or is_lowered or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not native.packs_bfloat16():
        return
    torch.manual_seed(rows)
    states = torch.randn(1, rows, inner, dtype=torch.bfloat16)
    weights = [torch.randn(outer, inner, dtype=torch.bfloat16) / inner**0.5 for outer in outers]
    biases = [torch.randn(outer, dtype=torch.bfloat16) if bias else None for outer in outers]
    packed = [weight.new_empty(packed_shape(*weight.shape)) for weight in weights]
    for weight, room in zip(weights, packed, strict=True):
        torch.ops.specplug.pack_weight(weight, room)
    together = JOINED[len(outers)](states, *packed, *biases, *outers) if len(outers) > 1 else None
    for index, outer in enumerate(outers):
        alone = torch.ops.specplug.linear(states, packed[index], biases[index], outer)
        if together is not None:
            assert torch.equal(alone, together[index])
        added = None if biases[index] is None else biases[index].double()
        exact = torch.nn.functional.linear(states.double(), weights[index].double(), added)
        torch.testing.assert_close(alone.double(), exact, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("inner", [64, 352, 1024, 2560])
def test_a_row_does_not_depend_on_the_rows_beside_it(inner: int) -> None:
    """Bit for bit: a token is verified as it would have been decoded."""
    if not native.packs_bfloat16():
        return
    torch.manual_seed(0)
    weight = torch.randn(96, inner, dtype=torch.bfloat16)
    packed = weight.new_empty(packed_shape(*weight.shape))
    torch.ops.specplug.pack_weight(weight, packed)
    states = torch.randn(700, inner, dtype=torch.bfloat16)
    whole = torch.ops.specplug.linear(states, packed, None, 96)
    for count in (1, 2, 15, 16, 17, 32, 33, 100, 200):
        assert torch.equal(torch.ops.specplug.linear(states[:count], packed, None, 96), whole[:count])
        assert torch.equal(torch.ops.specplug.linear(states[-count:], packed, None, 96), whole[-count:])


@pytest.mark.engine
def test_a_token_is_verified_as_it_would_be_decoded() -> None:
    """A bfloat16 forward of a chain gives the same logits, bit for bit, one token at a time and all at once."""
    if not native.packs_bfloat16():
        return
    with LLM("tiny", dtype="bfloat16", device="cpu", memory="128MiB", compile=False) as llm:
        runner, size = llm.engine.runner, llm.engine.config.block_size
        table = BlockTable(size)
        table.extend(range(-(-64 // size)))
        ids = torch.randint(
            3, runner.architecture.vocab_size, (64,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        runner.forward([ForwardRow(ids[:30], 0, table)])
        alone = [runner.forward([ForwardRow([token], 30 + i, table)])[0].clone() for i, token in enumerate(ids[30:])]
        for count in (2, 6, 16, 34):
            together = runner.forward([ForwardRow(ids[30 : 30 + count], 30, table)])
            assert torch.equal(torch.stack(alone[:count]), together)
