"""A speculator's own module, compiled: the same results at every size, kept by its operations, else left as it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import nn

from specplug import MemoryBudget, native
from specplug.contract.resources import KVLayer
from specplug.model.compile import compiled
from specplug.model.compile.compiled import CompiledStep, compile_step
from specplug.model.compile.cuda_graphs import HELD_TOKENS, MOST_CAPTURED, MOST_TOKENS, CudaGraphs, token_buckets
from specplug.model.kv_cache import BlockTable, KVCache
from specplug.model.load.packing import pack_linears
from specplug.model.paged import PagedBatch
from specplug.model.rows import ForwardRow, TreeMask
from support.attention_layer import DIM, KV_HEADS, WIDTH, Layer
from support.interpreted import interpret
from support.marks import slow_except

pytestmark = pytest.mark.engine

BLOCK = 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    assert native.load()
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECPLUG_CACHE", str(folder))
        yield folder


class Constant(nn.Module):
    """Adds numbers that stand in its code."""

    def __init__(self, numbers: list[float]) -> None:
        super().__init__()
        self.numbers = numbers

    def step(self, batch: Any, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (states[:, :2] + torch.tensor(self.numbers),)


class Embedding(nn.Module):
    """Ids in, and their rows of a table out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, WIDTH).requires_grad_(False)

    def step(self, batch: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.table(ids) * 2,)


def new_cache(dtype: torch.dtype) -> KVCache:
    return KVCache([KVLayer(KV_HEADS, DIM, DIM)], 20, BLOCK, dtype, CPU)


def kept(folder: Path) -> set[Path]:
    return set((folder / "forwards").glob("*.bin"))


def batch_of(cache: KVCache) -> PagedBatch:
    rows = []
    for first, (start, count, tree) in enumerate(
        [(0, 5, None), (7, 1, None), (4, 3, TreeMask.from_parents(4, [-1, -1]))]
    ):
        table = BlockTable(BLOCK)
        table.extend([1 + 2 * first, 8 + first])
        rows.append(ForwardRow([0] * count, start, table, tree))
    return PagedBatch(rows, cache)


@pytest.mark.parametrize("dtype", slow_except([torch.float32, torch.bfloat16], torch.float32))
def test_computes_what_the_module_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer().to(dtype)
    pack_linears(layer)
    cache, own = new_cache(dtype), new_cache(dtype)
    made: list[Any] = []
    compile_graph = compiled.compile_graph
    monkeypatch.setattr(compiled, "compile_graph", lambda *a: (made.append(a), compile_graph(*a))[1])
    for _ in range(2):
        machine_code = compile_step(layer.step, layer, cache, [torch.zeros(1, WIDTH, dtype=dtype)])
        assert isinstance(machine_code, CompiledStep)
    assert len(made) == 1
    for tensor, other in zip((*cache.keys, *cache.values), (*own.keys, *own.values), strict=True):
        tensor.normal_()
        other.copy_(tensor)
    states = torch.randn(WIDTH, 9, dtype=dtype).t()
    with torch.inference_mode():
        ours, theirs = machine_code(batch_of(cache), states), layer.step(batch_of(own), states)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip((*ours, *cache.keys, *cache.values), (*theirs, *own.keys, *own.values), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_other_operations_are_another_step(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    cache, made = new_cache(torch.float32), interpret(monkeypatch)
    before = kept(own_cache)
    states = torch.randn(9, WIDTH)
    results = []
    for scale in (2.0, 6.0):
        layer = Layer(scale)
        machine_code = compile_step(layer.step, layer, cache, [states[:1]])
        results.append(machine_code(batch_of(cache), states)[0])
    torch.testing.assert_close(results[0] * 3, results[1])
    assert len(made) == len(kept(own_cache) - before) == 2  # each has a file of its own


def test_what_depends_on_values_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    layer = Layer()
    with caplog.at_level(logging.WARNING):
        step = compile_step(layer.looking, layer, new_cache(torch.float32), [torch.zeros(1, WIDTH)])
    assert step == layer.looking
    (record,) = caplog.records
    assert record.getMessage().startswith("Layer.looking runs uncompiled: ")
    assert "\n" not in record.getMessage()


def test_other_constants_are_another_step(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, made = new_cache(torch.float32), interpret(monkeypatch)
    before = kept(own_cache)
    states = torch.randn(9, WIDTH)
    for numbers in ([1.0, 2.0], [30.0, 40.0]):
        module = Constant(numbers)
        step = compile_step(module.step, module, cache, [states[:1]])
        assert isinstance(step, CompiledStep), caplog.text
        torch.testing.assert_close(step(batch_of(cache), states)[0], states[:, :2] + torch.tensor(numbers))
    assert len(made) == len(kept(own_cache) - before) == 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integers_are_tried_as_they_are_given(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Random ones would be no ids."""
    interpret(monkeypatch)
    module, cache = Embedding(), new_cache(torch.float32)
    ids = torch.tensor([3, 10, 0], dtype=dtype)
    step = compile_step(module.step, module, cache, [ids])
    assert isinstance(step, CompiledStep), caplog.text
    torch.testing.assert_close(step(batch_of(cache), ids.repeat(3))[0], module.table(ids.repeat(3)) * 2)


def test_a_file_that_raises_is_replaced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor import CompiledArtifact

    def raising(*inputs: Any) -> Any:
        raise KeyError("no such thing")

    module, cache = Embedding(), new_cache(torch.float32)
    ids = torch.tensor([1])
    made = interpret(monkeypatch)
    module.table = nn.Embedding(13, WIDTH).requires_grad_(False)
    assert isinstance(compile_step(module.step, module, cache, [ids]), CompiledStep)
    monkeypatch.setattr(CompiledArtifact, "load", lambda **how: raising)
    assert isinstance(compile_step(module.step, module, cache, [ids]), CompiledStep)
    assert len(made) == 2
    monkeypatch.setattr(compiled, "compile_graph", lambda *a: raising)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert compile_step(module.step, module, cache, [ids]) == module.step
    (record,) = caplog.records
    assert record.getMessage() == "Embedding.step runs uncompiled: KeyError: 'no such thing'"


def test_the_outputs_that_captured_steps_hold_can_be_planned() -> None:
    on_cpu = MemoryBudget(
        total_bytes=1,
        block_size=16,
        max_num_seqs=1,
        max_model_len=1,
        max_num_batched_tokens=1,
        num_speculative_tokens=1,
        dtype=torch.float32,
    )
    on_gpu = attrs.evolve(on_cpu, compiled_output_tokens=HELD_TOKENS)
    assert on_cpu.compiled_output_bytes(10) == 0
    assert on_gpu.compiled_output_bytes(10) == 20 * MOST_CAPTURED


def test_captured_sizes() -> None:
    """Few graphs for few tokens, and little padding where matmuls are limited by arithmetic."""
    sizes = token_buckets(MOST_TOKENS)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == MOST_TOKENS
    assert len(sizes) < 30
    assert all(after <= before * 5 / 4 for before, after in pairwise(sizes) if before >= 256)
    assert token_buckets(300) == [*token_buckets(256), 300]
    assert [bucket for bucket in sizes if bucket <= 256] == token_buckets(256)


def test_graphs_hold_logits_of_verified_tokens_alone() -> None:
    plan = partial(CudaGraphs.planned_bytes, MOST_TOKENS, token_bytes=0, state_bytes=0, scratch_bytes=0)
    inputs = plan(most_logits=64, logits_bytes=0)
    held = [plan(most_logits=count, logits_bytes=10) - inputs for count in (1, 64, 2 * MOST_TOKENS)]
    assert held == [
        20 * 8,
        20 * 64,
        20 * MOST_TOKENS,
    ]  # twice: where they are computed, and where all graphs leave them
