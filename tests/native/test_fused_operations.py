"""What a traced graph's operations are put together to computes what they do, and is found in the models that have it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from specplug import LLM, native
from specplug.contract.resources import KVLayer
from specplug.model.batch import ForwardBatch
from specplug.model.compile.forwards import example_inputs, forward_step
from specplug.model.compile.passes import fuse
from specplug.model.compile.trace import trace_step
from specplug.model.kv_cache import BlockTable, KVCache
from specplug.model.load.packing import packed_shape
from specplug.model.rows import ForwardRow
from specplug.native.operators import ACTIVATIONS
from support.marks import slow_except
from support.models import save_model

NATIVE = native.load()
functional = torch.nn.functional


def turned(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    states, rest = states[..., : cosines.shape[-1]], states[..., cosines.shape[-1] :]
    first, second = states.chunk(2, dim=-1)
    whole = states * cosines + torch.cat((-second, first), dim=-1) * sines
    return torch.cat((whole, rest), dim=-1) if rest.shape[-1] else whole


def make_cache(heads: int, dim: int, dtype: torch.dtype) -> tuple[KVCache, BlockTable]:
    table = BlockTable(8)
    table.extend([5, 2, 9, 0])
    return KVCache([KVLayer(heads, dim, dim)], 12, 8, dtype, torch.device("cpu")), table


def attend(
    operation: str, parts: list[torch.Tensor], batch: Any, cache: KVCache, *angles: torch.Tensor
) -> torch.Tensor:
    fixed = (cache.keys[0], cache.values[0], batch.plan, batch.write_slots, 0.2, 0, 0.0, None)
    return getattr(torch.ops.specplug, operation)(*parts, *fixed, *angles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "heads"), [(64, 4), (32, 1), (48, 2), (20, 2)])
@pytest.mark.parametrize("part", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("count", [1, 6, 25])
def test_attention_turns_what_it_reads(dtype: torch.dtype, dim: int, heads: int, count: int, part: float) -> None:
    """Keys lie in the cache as if they had been turned before, and results are those of turned queries."""
    if not NATIVE:
        return
    torch.manual_seed(count)
    batches = []
    for _ in range(2):
        cache, table = make_cache(heads, dim, dtype)
        batches.append((cache, ForwardBatch([ForwardRow([1] * count, 0, table)], cache)))
    parts = [torch.randn(1, count, n, dim, dtype=dtype).transpose(1, 2) for n in (3 * heads, heads, heads)]
    angles = torch.randn(1, count, 2 * int(part * dim / 2))
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    ours = attend("attend_rope", parts, batches[0][1], batches[0][0], cosines, sines)
    exact = [turned(part.float(), cosines.float()[None], sines.float()[None]).to(dtype) for part in parts[:2]]
    theirs = attend("attend", [*exact, parts[2]], batches[1][1], batches[1][0])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(batches[0][0].keys[0], batches[1][0].keys[0], atol=tolerance, rtol=tolerance)
    assert torch.equal(batches[0][0].values[0], batches[1][0].values[0])


def test_angles_of_other_tokens_are_refused() -> None:
    if not NATIVE:
        return
    cache, table = make_cache(2, 16, torch.float32)
    batch = ForwardBatch([ForwardRow([1, 2], 0, table)], cache)
    parts = [torch.randn(1, 2, 2, 16) for _ in range(3)]
    with pytest.raises(RuntimeError, match="expected cosines of 2 tokens"):
        attend("attend_rope", parts, batch, cache, torch.ones(1, 3, 16), torch.ones(1, 3, 16))
    with pytest.raises(RuntimeError, match="expected sines of 2 tokens"):
        attend("attend_rope", parts, batch, cache, torch.ones(1, 2, 16), torch.ones(1, 2, 8))


def packed(weight: torch.Tensor) -> torch.Tensor:
    room = weight.new_empty(packed_shape(*weight.shape))
    torch.ops.specplug.pack_weight(weight, room)
    return room


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("inner", "outer"), [(64, 96), (352, 1248), (30, 45), (64, 7), (1056, 80)])
def test_gated_products_equal_pytorch(inner: int, outer: int, name: str, bias: bool) -> None:
    if not native.packs_bfloat16():
        return
    torch.manual_seed(inner)
    gate, up = (torch.randn(outer, inner, dtype=torch.bfloat16) * 2 / inner**0.5 for _ in range(2))
    biases = [torch.randn(outer, dtype=torch.bfloat16) if bias else None for _ in range(2)]
    for rows in (1, 3, 16, 17, 33, 70, 230, 600):
        states = torch.randn(1, rows, inner, dtype=torch.bfloat16) * 2
        ours = torch.ops.specplug.gated_linears(states, packed(gate), packed(up), *biases, outer, ACTIVATIONS[name])
        opened, factor = (
            functional.linear(states.double(), weight.double(), None if added is None else added.double())
            for weight, added in zip((gate, up), biases, strict=True)
        )
        activated = functional.silu(opened) if name == "silu" else functional.gelu(opened, approximate="tanh")
        torch.testing.assert_close(ours.double(), activated * factor, atol=2e-2, rtol=1e-2)


def test_gates_of_any_size_are_finite_and_not_a_number_stays_so() -> None:
    if not native.packs_bfloat16():
        return
    values = torch.tensor([-3e38, -1e5, -90.0, -1.0, -0.0, 0.0, 1.0, 90.0, 1e5, float("nan")])
    states = torch.zeros(len(values), 32, dtype=torch.bfloat16)
    states[:, 0] = values.bfloat16()
    eye, ones = torch.zeros(32, 32, dtype=torch.bfloat16), torch.zeros(32, 32, dtype=torch.bfloat16)
    eye[:, 0] = 1
    one = torch.ones(32, dtype=torch.bfloat16)
    for name, function in (("silu", functional.silu), ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh"))):
        ours = torch.ops.specplug.gated_linears(states, packed(eye), packed(ones), None, one, 32, ACTIVATIONS[name])
        expected = function(values.bfloat16().double()).bfloat16()
        torch.testing.assert_close(ours[:, 3], expected, equal_nan=True, atol=1e-6, rtol=1e-2)


def test_a_gated_row_does_not_depend_on_the_rows_beside_it() -> None:
    if not native.has_amx():
        return
    torch.manual_seed(0)
    weights = [packed(torch.randn(96, 352, dtype=torch.bfloat16)) for _ in range(2)]
    states = torch.randn(700, 352, dtype=torch.bfloat16)

    def gated(some: torch.Tensor) -> torch.Tensor:
        return torch.ops.specplug.gated_linears(some, *weights, None, None, 96, 0)

    whole = gated(states)
    for count in (1, 2, 15, 16, 17, 33, 100):
        assert torch.equal(gated(states[:count]), whole[:count])
        assert torch.equal(gated(states[-count:]), whole[-count:])


WIDE = {"hidden_size": 64, "intermediate_size": 96}  # packed layers are no narrower


@pytest.mark.engine
@pytest.mark.parametrize(
    ("architecture", "rotations", "gates"),
    slow_except(
        [
            ("llama", 3, 3),
            ("qwen3", 3, 3),
            ("gemma2", 3, 3),
            ("phi3", 3, 3),  # whose gates and their factors are one weight, and whose heads might be turned in part
            ("gpt_neox", 3, 0),  # whose heads are
            ("mixtral", 3, 0),
            ("gpt_oss", 0, 0),
            ("opt", 0, 0),
        ],
        "llama",
        "phi3",
        "gpt_neox",
        "gpt_oss",
    ),
)
def test_models_in_which_they_are_found(tmp_path: Path, architecture: str, rotations: int, gates: int) -> None:
    if not (NATIVE and native.packs_bfloat16()):
        return
    folder = save_model(tmp_path, architecture, **({} if architecture == "opt" else WIDE))
    options = {"skip_tokenizer_init": True, "memory": "64MiB", "compile": False}
    with LLM(folder, device="cpu", dtype="bfloat16", **options) as llm:
        runner = llm.engine.runner
        inputs = example_inputs(runner.device)
        graph = trace_step(forward_step(runner), runner.model, runner.cache_tensors, inputs).module.graph
    found = Counter(node.target for node in graph.nodes)
    operations = torch.ops.specplug
    assert found[operations.attend_rope.default] == rotations
    assert found[operations.attend.default] == 3 - rotations
    assert found[operations.gated_linears.default] == gates
    assert not rotations or not found[torch.ops.aten.neg.default]  # nothing turns them a second time


def test_heads_that_are_turned_otherwise_stay_as_they_are() -> None:
    """By other angles for keys than for queries, the other way round, or all tokens by one angle, or their last elements."""
    if not NATIVE:
        return
    cache, table = make_cache(2, 16, torch.float32)
    batch = ForwardBatch([ForwardRow([1, 2], 0, table)], cache)
    angles = torch.randn(1, 2, 8)

    def backwards(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        return turned(states, cosines, -sines)

    def from_behind(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        rest, last = states[..., :8], states[..., 8:]
        return torch.cat((turned(last, cosines, sines), rest), dim=-1)

    def rotations(of_query: Any, of_key: Any) -> int:
        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
            cosines, sines = angles.cos()[None], angles.sin()[None]
            return attend("attend", [of_query(query, cosines, sines), of_key(key, cosines, sines), value], batch, cache)

        parts = [torch.randn(1, 2, 2, 16) for _ in range(3)]
        module = make_fx(run)(*parts, angles)
        fuse(module, torch.device("cpu"))
        taken = sum(node.target is torch.ops.specplug.attend_rope.default for node in module.graph.nodes)
        torch.testing.assert_close(module(*parts, angles), run(*parts, angles), atol=1e-5, rtol=1e-5)
        return taken

    assert rotations(turned, turned) == 1
    assert rotations(turned, backwards) == 0
    assert rotations(from_behind, from_behind) == 0
    assert rotations(turned, lambda states, cosines, sines: turned(states, sines, cosines)) == 0
    assert rotations(turned, lambda states, cosines, sines: turned(states, cosines[..., :1, :], sines)) == 0
    assert rotations(turned, lambda states, cosines, sines: states) == 0
