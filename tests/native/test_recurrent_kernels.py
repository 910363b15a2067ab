"""The kernels of recurrent layers, against the same layers in PyTorch: rows, entries, trees and states."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.lfm2.modeling_lfm2 import causal_conv1d_fn
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from specplug.model.recurrent.batch import StateBatch, StateRow
from specplug.model.recurrent.convolution import ShortConvolution
from specplug.model.recurrent.delta_rule import DeltaRule
from specplug.model.recurrent.memory import StateMemory, TracedRows
from specplug.model.recurrent.state_space import StateSpaceScan
from specplug.native import library

pytestmark = pytest.mark.skipif(not library.load(), reason="no kernels on this machine")
SLOTS, HELD = 4, 6
CPU = torch.device("cpu")
Inputs = Callable[[int, torch.dtype], dict[str, Any]]


@attrs.frozen
class Case:
    """A function that carries state, the sizes of its memory, and arguments for some tokens."""

    memory: type[StateMemory]
    original: Callable[..., Any]
    sizes: tuple[int, ...]
    inputs: Inputs

    def allocate(self, dtype: torch.dtype) -> StateMemory:
        return self.memory(self.sizes, SLOTS, HELD, dtype, CPU)

    def run(self, memory: StateMemory, batch: StateBatch | TracedRows, given: dict[str, Any]) -> torch.Tensor:
        result = memory.run(batch, inspect.unwrap(self.original), **given)
        return result[0] if isinstance(result, tuple) else result


def convolution(channels: int, width: int, activation: str | None, *, biased: bool) -> Case:
    weight, bias = torch.randn(channels, width), torch.randn(channels) if biased else None

    def inputs(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        hidden = torch.randn(1, tokens, 2 * channels)[..., :channels].to(dtype)  # rows with something between them
        own = None if bias is None else bias.to(dtype)
        return {"hidden_states": hidden.mT, "weight": weight.to(dtype), "bias": own, "activation": activation}

    return Case(ShortConvolution, causal_conv1d_fn, (channels, width), inputs)


def delta(key_heads: int, heads: int, key_dim: int, value_dim: int, *, by_channel: bool) -> Case:
    def inputs(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        query, key = (torch.randn(1, tokens, key_heads, key_dim).to(dtype) for _ in range(2))
        rates = (heads, key_dim) if by_channel else (heads,)
        return {
            "query": query,
            "key": key,
            "value": torch.randn(1, tokens, heads, value_dim).to(dtype),
            "g": -torch.rand(1, tokens, *rates),
            "beta": torch.rand(1, tokens, heads).to(dtype),
            "use_qk_l2norm_in_kernel": True,
        }

    original = chunk_kimi_delta_attention if by_channel else torch_chunk_gated_delta_rule
    return Case(DeltaRule, original, (key_heads, heads, key_dim, value_dim, key_dim if by_channel else 1), inputs)


def scan(heads: int, width: int, groups: int, size: int) -> Case:
    rates, skips, bias = -torch.rand(heads) - 0.1, torch.randn(heads), torch.randn(heads)

    def inputs(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, tokens, heads, width).to(dtype),
            "dt": torch.randn(1, tokens, heads).to(dtype),
            "A": rates,
            "B": torch.randn(1, tokens, groups, size).to(dtype),
            "C": torch.randn(1, tokens, groups, size).to(dtype),
            "chunk_size": 16,
            "D": skips,
            "dt_bias": bias,
            "dt_softplus": True,
            "dt_limit": (0.01, 5.0),
        }

    return Case(StateSpaceScan, mamba2_chunk_scan, (heads, width, groups, size), inputs)


torch.manual_seed(0)
CASES = {
    "convolution": convolution(70, 3, None, biased=False),
    "convolution, silu": convolution(130, 4, "silu", biased=True),
    "convolution, gelu": convolution(64, 4, "gelu", biased=True),
    "delta": delta(2, 4, 24, 45, by_channel=False),
    "delta, whole registers": delta(2, 2, 32, 64, by_channel=False),
    "delta by channel": delta(3, 3, 9, 12, by_channel=True),
    "scan": scan(8, 7, 2, 21),
    "scan, whole registers": scan(4, 8, 1, 32),
}


class Rows:
    """Rows of random forwards: prompts, chains and trees, each from the entries that some of its tokens were kept as."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._entries = dict.fromkeys(range(SLOTS), -1)  # -1: the row has not begun

    def next(self) -> list[StateRow]:
        rng, rows, first = self._rng, [], 0
        for slot in rng.sample(range(SLOTS), rng.randint(1, SLOTS)):
            is_fresh = self._entries[slot] < 0 or rng.random() < 0.1
            entries = 0 if is_fresh else self._entries[slot]
            kept = sorted(rng.sample(range(entries), rng.randint(0, entries)))
            count, ancestors = rng.choice((1, 1, 2, 4, HELD, 20, 70)), None
            if count <= HELD and rng.random() < 0.4:
                replayed, passed, ancestors = kept, 0, self._tree(count)
            else:
                cut = rng.randint(0, len(kept))
                if len(kept) - cut + count > HELD:
                    cut = len(kept)
                replayed = kept[:cut]
                passed = 0 if cut < len(kept) else rng.randint(max(0, count - HELD), count)
            row = StateRow(slot, is_fresh, first, count, replayed, kept[len(replayed) :], passed, ancestors)
            self._entries[slot] = row.width
            rows.append(row)
            first += count
        return rows

    def _tree(self, count: int) -> np.ndarray:
        ancestors = np.eye(count, dtype=np.bool_)
        for node in range(1, count):
            parent = self._rng.randrange(node)
            ancestors[node] |= ancestors[parent]
        return ancestors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_they_give_what_pytorch_gives(name: str, dtype: torch.dtype) -> None:
    case, rows = CASES[name], Rows(random.Random(1))
    ours, theirs = case.allocate(dtype), case.allocate(dtype)
    kinds = set()
    for _ in range(30):
        batch = rows.next()
        given = case.inputs(sum(row.count for row in batch), dtype)
        kinds |= {(bool(r.replayed), bool(r.remaining), r.passed > 0, r.ancestors is not None) for r in batch}
        results = [
            case.run(memory, StateBatch(batch, HELD, CPU, is_native=is_native), given)
            for memory, is_native in ((ours, True), (theirs, False))
        ]
        assert results[0].shape == results[1].shape
        assert results[0].dtype == results[1].dtype
        near = {"atol": 2e-4, "rtol": 2e-4} if dtype == torch.float32 else {"atol": 0.06, "rtol": 0.03}
        torch.testing.assert_close(*results, **near)
        for one, other in zip(ours.tensors, theirs.tensors, strict=True):
            for row in batch:
                used = _used(case, one, row.width)
                torch.testing.assert_close(one[row.slot][used], other[row.slot][used], atol=2e-4, rtol=2e-4)
    assert len(kinds) == 8


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_state_does_not_depend_on_how_its_tokens_came(name: str, threads: int) -> None:
    """One prompt; or tokens one by one, as drafts in trees with others between them, and beside other rows: the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case, count = CASES[name], 75
        given = case.inputs(count, torch.bfloat16)
        whole, parts = case.allocate(torch.bfloat16), case.allocate(torch.bfloat16)
        expected = case.run(whole, _batch(StateRow(0, True, 0, count, [], [], count)), given)
        begin, waiting = 0, 0
        while begin < count:
            size = min(1 + begin % 4, count - begin)
            tree = np.tri(2 * size, dtype=np.bool_)
            tree[2::2, 1::2] = tree[3::2, 1::2] = False  # every second node is a wrong leaf
            tree |= np.eye(2 * size, dtype=np.bool_)
            places = [place for each in range(begin, begin + size) for place in (each, (each * 7 + 3) % count)]
            is_tree = 2 * size <= HELD
            if not is_tree:
                places, tree = list(range(begin, begin + size)), None
            mixed = [*range(11), *places]
            rows = [
                StateRow(2, True, 0, 11, [], [], 9),
                StateRow(1, begin == 0, 11, len(places), range(0, waiting, 2), [], 0, tree),
            ]
            if not is_tree:
                rows[1] = attrs.evolve(rows[1], passed=size)
            own = {key: _take(case, key, value, mixed) for key, value in given.items()}
            result = case.run(parts, _batch(*rows), own).movedim(case.memory.axis, 0)[11:]
            wanted = expected.movedim(case.memory.axis, 0)[begin : begin + size]
            assert torch.equal(result[:: 2 if is_tree else 1], wanted)
            begin, waiting = begin + size, 2 * size if is_tree else 0
        last = StateRow(1, False, 0, 1, range(0, waiting, 2), [], 0)
        single = {key: _take(case, key, value, [0]) for key, value in given.items()}
        case.run(parts, _batch(last), single)
        case.run(whole, _batch(attrs.evolve(last, slot=0, replayed=[])), single)
        for tensor, other in zip(whole.tensors, parts.tensors, strict=True):
            used = _used(case, tensor, 1)
            assert torch.equal(tensor[0][used], other[1][used])
    finally:
        torch.set_num_threads(before)


def _used(case: Case, tensor: torch.Tensor, entries: int) -> slice:
    """The part of a row's memory that holds something, if it has so many entries."""
    if case.memory is ShortConvolution:
        return slice(case.sizes[1] - 1 + entries)
    return slice(entries) if tensor.shape[1] == HELD else slice(None)


def _batch(*rows: StateRow) -> StateBatch:
    return StateBatch(rows, HELD, CPU, is_native=True)


def _take(case: Case, name: str, value: Any, places: list[int]) -> Any:
    return value.index_select(case.memory.axis, torch.tensor(places)) if name in case.memory.sequences else value


@pytest.mark.parametrize("name", ["convolution", "delta", "scan"])
@pytest.mark.parametrize(
    "plan",
    [
        [1],
        [1, SLOTS, 0, 0, 2, 0, 0, 0, 0],
        [1, 0, 0, 1, 2, 0, 0, 0, 0],
        [1, 0, 0, 0, 2, 3, 0, 0, 0],
        [1, 0, 0, 0, 2, 0, 1, 0, 0],
        [1, 0, 0, 0, 2, 0, 1, 0, 0, HELD],
        [1, 0, 0, 0, 2, 0, 0, 2, 0, 2, 1],
        [1, 0, 0, 0, 2, 0, 0, 0, 1, -1, 1],
        [1, 0, 0, 0, 2, 0, 0, HELD, 0, *range(HELD)],
    ],
    ids=["cut off", "slot", "tokens", "passed", "short", "entry", "order", "parent", "too many"],
)
def test_wrong_rows_are_refused(name: str, plan: list[int]) -> None:
    case = CASES[name]
    rows = TracedRows(torch.tensor(plan, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="recurrent: "):
        case.run(case.allocate(torch.float32), rows, case.inputs(2, torch.float32))


def test_wrong_memory_is_refused() -> None:
    for name in ("delta", "scan", "convolution"):
        case = CASES[name]
        memory = case.allocate(torch.float32)
        first = next(iter(dict(memory.named_buffers())))
        memory.register_buffer(first, getattr(memory, first)[..., :-1], persistent=False)
        with pytest.raises(RuntimeError, match="expected"):
            case.run(memory, _batch(StateRow(0, True, 0, 2, [], [], 2)), case.inputs(2, torch.float32))
