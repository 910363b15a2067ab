"""Native operators refuse what does not fit together; a plugin that gives it to them loses its drafts and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, KVLayer, MemoryRegion, Proposal, SamplingParams, hookimpl, native
from specplug.model.kv_cache import BlockTable, KVCache
from specplug.model.load.packing import PackedLinear
from specplug.model.paged import PagedBatch
from specplug.model.rows import ForwardRow
from support.models import save_model
from support.speculators import provide

NATIVE = native.load()
HEADS, KV_HEADS, DIM, TOKENS, BLOCK = 4, 2, 32, 3, 8
CPU = torch.device("cpu")


def arguments(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """A call of `attend` in which everything fits: a row of 3 tokens in two blocks that do not follow each other."""
    cache = KVCache([KVLayer(KV_HEADS, DIM, DIM)], 6, BLOCK, dtype, CPU)
    table = BlockTable(BLOCK)
    table.extend([4, 1])
    batch = PagedBatch([ForwardRow([0] * TOKENS, 7, table)], cache)
    return {
        "query": torch.randn(1, HEADS, TOKENS, DIM, dtype=dtype),
        "key": torch.randn(1, KV_HEADS, TOKENS, DIM, dtype=dtype),
        "value": torch.randn(1, KV_HEADS, TOKENS, DIM, dtype=dtype),
        "keys": cache.keys[0],
        "values": cache.values[0],
        "plan": batch.plan,
        "slots": batch.write_slots,
        "sinks": None,
    }


def attend(given: dict[str, Any]) -> torch.Tensor:
    *tensors, sinks = given.values()
    return torch.ops.specplug.attend(*tensors, 1.0, 0, 0.0, sinks)


def put(plan: torch.Tensor, index: int, number: int) -> torch.Tensor:
    return plan.index_fill(0, torch.tensor([index]), number)


WRONG: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "dtype of all new": (
        dict.fromkeys(("query", "key", "value"), torch.Tensor.float),
        "the query is Float, but the cached keys BFloat16",
    ),
    "dtype of keys": ({"key": torch.Tensor.float}, "the query is BFloat16, but the key Float"),
    "half": ({"query": torch.Tensor.half}, "float32 or bfloat16, not Half"),
    "no batch dimension": ({"query": lambda t: t[0]}, r"expected query, key and value of shape"),
    "query dimension": ({"query": lambda t: torch.cat([t, t], 3)}, "do not go together"),
    "value heads": ({"value": lambda t: t[:, :1]}, "do not go together"),
    "fewer keys": ({"key": lambda t: t[:, :, 1:]}, "do not go together"),
    "width of the cache": (
        {name: lambda t: torch.cat([t, t], 3) for name in ("query", "key")},
        r"a dense cache of keys of shape \[2, slots, 64\], not \[2, 48, 32\]",
    ),
    "heads of the cache": ({"values": lambda t: t[:1]}, "a dense cache of values"),
    "strided cache": ({"keys": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)}, "a dense cache of keys"),
    "fewer slots of values": ({"values": lambda t: t[:, :40].contiguous()}, "48 slots of keys, but 40 of values"),
    "plan of another dtype": ({"plan": torch.Tensor.long}, "a dense int32 plan, not Long"),
    "plan cut off": ({"plan": lambda t: t[:6].contiguous()}, "the plan of 6 numbers is cut off"),
    "no plan": ({"plan": lambda t: t[:0].contiguous()}, "the plan of 0 numbers is cut off"),
    "more tokens": ({"plan": lambda t: put(t, 1, 9)}, "describes 9 tokens, but there are 3 queries"),
    "row of more queries": ({"plan": lambda t: put(t, 5, 4)}, "row 0 of the plan"),
    "row that begins before the batch": ({"plan": lambda t: put(t, 4, -1)}, "row 0 of the plan"),
    "row outside of the cache": ({"plan": lambda t: put(t, 7, 44)}, "lies outside"),
    "table outside of the plan": ({"plan": lambda t: put(t, 8, 400)}, "lies outside"),
    "block outside of the cache": ({"plan": lambda t: put(t, 13, 6)}, "the cache's 48 slots"),
    "tree outside of the plan": ({"plan": lambda t: put(put(t, 10, 10), 11, 0)}, "lies outside"),
    "slots of another dtype": ({"slots": torch.Tensor.int}, "dense int64 slots, not Int"),
    "fewer slots": ({"slots": lambda t: t[1:]}, "2 slots for 3 tokens"),
    "slot outside of the cache": ({"slots": lambda t: t + 40}, "of a cache of 48"),
    "sinks of another number": ({"sinks": lambda t: torch.zeros(3)}, "expected 4 sinks"),
}


@pytest.mark.parametrize("case", WRONG)
def test_attention_refuses_what_does_not_fit(case: str) -> None:
    assert NATIVE
    changes, message = WRONG[case]
    given = arguments()
    assert attend(given).isfinite().all()
    for name, change in changes.items():
        given[name] = change(given[name])
    with pytest.raises(RuntimeError, match=message):
        attend(given)


def test_products_refuse_what_does_not_fit() -> None:
    if not native.packs_bfloat16():
        return
    layer = PackedLinear(torch.nn.Linear(64, 40, dtype=torch.bfloat16))
    rows = torch.randn(3, 64, dtype=torch.bfloat16)
    assert layer(rows).shape == (3, 40)
    with pytest.raises(RuntimeError, match="expected bfloat16 rows, not Float"):
        layer(rows.float())
    with pytest.raises(
        RuntimeError, match=r"for 62 inputs and 40 outputs expected a packed bfloat16 weight of 2 x 1984"
    ):
        layer(rows[:, :62])
    linear = torch.ops.specplug.linear
    with pytest.raises(RuntimeError, match="expected a packed bfloat16 weight"):
        linear(rows, layer.packed, None, 65)
    with pytest.raises(RuntimeError, match="expected a bias of 40"):
        linear(rows, layer.packed, torch.zeros(3), 40)
    with pytest.raises(RuntimeError, match="expected a bfloat16 matrix, not Float"):
        torch.ops.specplug.pack_weight(torch.zeros(4, 4), layer.packed)
    with pytest.raises(RuntimeError, match=r"a packed bfloat16 weight of 1 x 128 or .*, not BFloat16"):
        torch.ops.specplug.pack_weight(torch.zeros(4, 4, dtype=torch.bfloat16), layer.packed)


class WrongDtype:
    """Attends in float32 over a region in bfloat16."""

    @hookimpl
    def plan_memory(self, budget: Any) -> list[MemoryRegion]:
        return [MemoryRegion("own", "kv_cache", layers=(KVLayer(KV_HEADS, DIM, DIM),), dtype=torch.bfloat16)]

    @hookimpl
    def warmup(self, resources: Any) -> None:
        self.cache = resources.kv_caches["own"]

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        rows = [ForwardRow(row.tokens[-1:], len(row.tokens) - 1, row.table) for row in batch.rows]
        paged = PagedBatch(rows, self.cache)
        states = torch.randn(KV_HEADS, paged.num_tokens, DIM)
        paged.attend(0, states, states, states, 1.0)
        return Proposal([[1]] * len(batch.rows))


@pytest.mark.engine
def test_a_plugin_that_attends_wrongly_costs_its_drafts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_model(tmp_path, "llama")
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    options: dict[str, Any] = {"skip_tokenizer_init": True, "device": "cpu", "memory": "64MiB"}
    with LLM(folder, **options) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
    speculator = WrongDtype()
    with caplog.at_level(logging.WARNING), LLM(folder, **options, **provide(lambda config, target: speculator)) as llm:
        outputs = llm.generate(prompts, greedy)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert llm.engine.stats.num_draft_tokens == 0
    assert "the query is Float, but the cached keys BFloat16" in caplog.text
