"""On a GPU: our kernels equal PyTorch's, captured forwards equal the model's own, and a step waits for the host once."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specplug import LLM, SamplingParams
from specplug.contract.resources import KVLayer
from specplug.model.attention.interface import AttentionSite
from specplug.model.batch import ForwardBatch
from specplug.model.compile.compiled import CompiledStep, compile_step
from specplug.model.compile.loops import CapturedLoop, compile_loop
from specplug.model.kv_cache import BlockAllocator, BlockTable, KVCache
from specplug.model.loop import plain_loop
from specplug.model.paged import PagedBatch
from specplug.model.pending import PendingTokens, UpcomingTokens
from specplug.model.rows import ForwardRow
from specplug.native.gpu import cuda
from specplug.native.gpu.linear import products
from specplug.sampling.distributions import argmax
from support.attention_layer import DIM, KV_HEADS, WIDTH, Layer
from support.kernel_rows import BLOCK, BLOCKS, random_row
from support.models import VOCABULARY, save_model
from support.reference import decisive_prompts

GPU = torch.device("cuda")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (20, 24), (128, 128), (256, 192)])
@pytest.mark.parametrize(("window", "softcap", "sinks"), [(None, None, False), (9, None, False), (40, 5.0, True)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (16, 1)])
def test_attention_equals_pytorch(
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    heads: int,
    kv_heads: int,
) -> None:
    assert cuda.load()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        cache = KVCache([KVLayer(kv_heads, key_dim, value_dim)], BLOCKS, BLOCK, dtype, GPU)
        cache.keys[0].normal_()
        cache.values[0].normal_()
        free = list(range(BLOCKS)) if seed % 2 else rng.permutation(BLOCKS).tolist()
        kinds = rng.choice(["decode", "prefill", "tree", "deep tree"], size=int(rng.integers(1, 4)))
        rows = [random_row(rng, free, kind) for kind in kinds]
        total = sum(len(row.tokens) for row in rows)
        query = torch.randn(1, total, heads, key_dim, dtype=dtype, device=GPU).transpose(1, 2)
        key = torch.randn(1, total, kv_heads, key_dim, dtype=dtype, device=GPU).transpose(1, 2)
        value = torch.randn(1, kv_heads, total, value_dim, dtype=dtype, device=GPU)
        extra = torch.randn(heads, dtype=dtype, device=GPU) if sinks else None
        results = []
        for is_native in (True, True, False):
            kind = dtype if is_native else torch.float32  # half precision is measured against full
            own = KVCache([KVLayer(kv_heads, key_dim, value_dim)], BLOCKS, BLOCK, kind, GPU)
            own.keys[0].copy_(cache.keys[0])
            own.values[0].copy_(cache.values[0])
            site = AttentionSite(own.keys[0], own.values[0])
            site.batch = ForwardBatch(rows, own)
            assert site.batch.is_native
            site.batch.is_native = is_native
            new = (query.to(kind), key.to(kind), value.to(kind))
            own_sinks = None if extra is None else extra.to(kind)
            attended = site.attend(*new, key_dim**-0.5, window, softcap, own_sinks)
            results.append((attended, own.keys[0], own.values[0]))
        (ours, *our_cache), (again, *_), (theirs, *their_cache) = results
        assert torch.equal(ours, again)
        assert all(torch.equal(a.float(), b) for a, b in zip(our_cache, their_cache, strict=True))
        torch.testing.assert_close(ours.float(), theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [1, 63, 1024, 5000])
@pytest.mark.parametrize("count", [1, 2, 8, 16, 64, 300])
def test_long_rows_are_cut_and_merged(length: int, count: int, dtype: torch.dtype) -> None:
    """Repeated in one plan: every launch leaves the counters as it found them."""
    heads, kv_heads, dim, block = 32, 8, 128, 16
    blocks = -(-(length + count) // block)
    cache = KVCache([KVLayer(kv_heads, dim, dim)], blocks, block, dtype, GPU)
    cache.keys[0].normal_()
    cache.values[0].normal_()
    table = BlockTable(block)
    table.extend(list(reversed(range(blocks))))
    batch = ForwardBatch([ForwardRow([0] * count, length, table)], cache)
    query = torch.randn(1, heads, count, dim, dtype=dtype, device=GPU)
    key, value = (torch.randn(1, kv_heads, count, dim, dtype=dtype, device=GPU) for _ in range(2))
    site = AttentionSite(cache.keys[0], cache.values[0])
    site.batch = batch
    plan = batch.plan.clone()
    ours = [site.attend(query, key, value, dim**-0.5, None, None, None) for _ in range(20)]
    assert torch.equal(plan, batch.plan)
    assert all(torch.equal(ours[0], other) for other in ours[1:])
    exact = KVCache([KVLayer(kv_heads, dim, dim)], blocks, block, torch.float32, GPU)
    exact.keys[0].copy_(cache.keys[0])
    exact.values[0].copy_(cache.values[0])
    site = AttentionSite(exact.keys[0], exact.values[0])
    site.batch = batch
    batch.is_native = False
    theirs = site.attend(query.float(), key.float(), value.float(), dim**-0.5, None, None, None)
    torch.testing.assert_close(ours[0].float(), theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 40, 64, 65])
@pytest.mark.parametrize(
    ("inner", "outers"), [(64, (32, 96, 7)), (48, (5, 64)), (4096, (1024, 512, 512)), (1040, (40,))]
)
def test_products_equal_pytorch(rows: int, inner: int, outers: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(rows)
    states = torch.randn(1, rows, inner, dtype=torch.bfloat16, device=GPU)
    weights = [torch.randn(outer, inner, dtype=torch.bfloat16, device=GPU) / inner**0.5 for outer in outers]
    biases = [torch.randn(outer, dtype=torch.bfloat16, device=GPU) if bias else None for outer in outers]
    for weight, added, ours in zip(weights, biases, products(states, weights, biases), strict=True):
        exact = torch.nn.functional.linear(states.double(), weight.double(), None if added is None else added.double())
        torch.testing.assert_close(ours.double(), exact, atol=3e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 128_256), (3, 2048), (64, 50_257), (2, 7)])
def test_the_most_likely_token_is_pytorchs(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    """The first of equals, which half precision has many of; NaN is found wherever it stands."""
    torch.manual_seed(rows)
    logits = torch.randn(rows, vocabulary, device=GPU).to(dtype)
    assert argmax(logits) == (logits.cpu().float().argmax(dim=-1).tolist(), None)
    for value in (0.0, -0.0, float("-inf"), -3.0):
        logits = torch.full((rows, vocabulary), value, dtype=dtype, device=GPU)
        assert argmax(logits) == ([0] * rows, None)
    logits[:, 1::2] = 0.0
    logits[:, 2::2] = -0.0
    assert argmax(logits)[0] == [1] * rows
    logits[rows - 1, vocabulary - 2] = float("nan")
    assert argmax(logits)[1] == rows - 1


def test_a_plan_longer_than_usual_is_copied_too(tmp_path: Path) -> None:
    """Many rows, none of them one slice: their tables and parts are more than a graph copies by itself."""
    folder = save_model(tmp_path / "llama", "llama", max_position_embeddings=4096)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (700,), generator=generator).tolist() for _ in range(24)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    found = []
    for compiled in (True, False):
        with LLM(folder, skip_tokenizer_init=True, compile=compiled, max_num_seqs=24, block_size=1) as llm:
            allocator = llm.engine.scheduler.allocator
            allocator.allocate = lambda count, _take=allocator, **_: _scattered(_take, count)  # type: ignore[method-assign]
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    agreeing = sum(a == b for a, b in zip(*found, strict=True))
    assert agreeing == len(prompts)


def _scattered(allocator: BlockAllocator, count: int) -> list[int] | None:
    """Every second free block first."""
    free = np.flatnonzero(allocator._free)
    return allocator._take(np.concatenate([free[::2], free[1::2]])[:count].tolist()) if count <= len(free) else None


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen2", "gpt_neox"])
def test_captured_engines_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, architecture: str
) -> None:
    monkeypatch.setenv("SPECPLUG_CACHE", str(tmp_path / "cache"))
    folder = save_model(tmp_path / architecture, architecture)
    pairs = decisive_prompts(folder, 6, 18, VOCABULARY)
    greedy = SamplingParams(temperature=0, max_tokens=18)
    options = {"skip_tokenizer_init": True, "strict": True, "compile": True, "max_num_seqs": 4}
    with caplog.at_level(logging.WARNING), LLM(folder, speculative_config=NGRAM, **options) as llm:
        assert not caplog.records
        assert llm.engine.runner.compiled is not None
        assert llm.engine.runner.graphs is not None
        outputs = llm.generate([prompt for prompt, _ in pairs], greedy)
        assert [output.outputs[0].token_ids for output in outputs] == [output for _, output in pairs]


def test_plain_steps_do_not_synchronise(tmp_path: Path) -> None:
    """The host waits for the event after the copy of the tokens, and for nothing else."""
    folder = save_model(tmp_path / "llama", "llama")
    with LLM(folder, skip_tokenizer_init=True, compile=True, max_num_seqs=4) as llm:
        engine = llm.engine
        engine.add_request("a", [5, 6, 7, 8], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        for _ in range(5):
            engine.step()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # which warns that it is a prototype
            try:
                for _ in range(10):
                    engine.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert not [warning for warning in seen if "called a synchronizing" in str(warning.message)]


@pytest.mark.parametrize("method", ["eagle3", "draft_model"])
def test_drafts_start_before_the_host_knows_what_was_accepted(method: str) -> None:
    """Output is that of plain decoding, and such a step waits for nothing but the event after the copy of the tokens."""
    prompts = [f"def {name}(values, limit):\n    " for name in ("first", "smallest", "add_all", "as_text", "count")]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    options: dict[str, Any] = {
        "dtype": "float32",
        "memory": "1GiB",
        "max_model_len": 256,
        "max_num_seqs": 4,
        "strict": True,
    }
    with LLM("tiny", compile=False, **options) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    config = {"method": method, "model": "tiny", "num_speculative_tokens": 3}
    with LLM("tiny", compile=True, speculative_config=config, **options) as llm:
        engine: Any = llm.engine
        begin, steps = engine._early.begin, []
        engine._early.begin = lambda target: steps.append(begin(target)) or steps[-1]
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
        assert len([step for step in steps if step is not None]) > 0.8 * len(steps) > 10
        engine.add_request("a", llm.get_tokenizer().encode(prompts[0]), params)
        for _ in range(5):
            engine.step()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(3):
                    engine.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert not [str(warning.message) for warning in seen if "called a synchronizing" in str(warning.message)]


def test_without_graphs_and_without_compilation_nothing_changes(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama", "llama")
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [pair[0] for pair in decisive_prompts(folder, 3, 24, VOCABULARY)]
    found = []
    for compiled in (True, False):
        with LLM(folder, skip_tokenizer_init=True, compile=compiled) as llm:
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_speculators_own_step_is_captured(dtype: torch.dtype) -> None:
    """It computes what the module does for every number of tokens, and what it returned stays as it was."""
    layer = Layer().to(GPU, dtype)
    cache, own = (KVCache([KVLayer(KV_HEADS, DIM, DIM)], 120, 8, dtype, GPU) for _ in range(2))
    step = compile_step(layer.step, layer, cache, [torch.zeros(1, WIDTH, dtype=dtype, device=GPU)])
    assert isinstance(step, CompiledStep)
    assert step.graphs is not None
    for tensor, other in zip((*cache.keys, *cache.values), (*own.keys, *own.values), strict=True):
        other.copy_(tensor.normal_())
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for count in (1, 2, 3, 7, 40, 64, 70, 1):
        rows = []
        for first, (start, size) in enumerate([(3, count - count // 2), (9, count // 2)]):
            table = BlockTable(8)
            table.extend(range(60 * first, 60 * first + -(-(start + size) // 8)))
            if size:
                rows.append(ForwardRow([0] * size, start, table))
        states = torch.randn(count, WIDTH, dtype=dtype, device=GPU)
        with torch.inference_mode():
            ours = step(PagedBatch(rows, cache), states)
            theirs = layer.step(PagedBatch(rows, own), states)
        kept += zip(ours, theirs, strict=True)
        torch.testing.assert_close(cache.keys[0], own.keys[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for a, b in kept:
        torch.testing.assert_close(a, b, atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_loop_gives_what_its_steps_give(dtype: torch.dtype) -> None:
    """For rows of different lengths and numbers of new tokens, and for batches that a graph does not hold."""
    layer = Layer().to(GPU, dtype)
    caches = [KVCache([KVLayer(KV_HEADS, DIM, DIM)], 160, 8, dtype, GPU) for _ in range(2)]
    states = torch.randn(400, WIDTH, dtype=dtype, device=GPU)
    limits: dict[str, Any] = {"atol": 8 * TOLERANCE[dtype], "rtol": 8 * TOLERANCE[dtype]}

    def begin(
        batch: Any, ids: torch.Tensor, last: torch.Tensor, given: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        output = layer.step(batch, given + 0.1 * ids[:, None].to(dtype))[0][last]
        return [output], output

    def step(batch: Any, state: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        output = layer.step(batch, state)[0]
        return [output], output

    captured = compile_loop(begin, step, caches[0], 4, [states])
    assert isinstance(captured, CapturedLoop)
    plain = plain_loop(begin, step, caches[1], 4, [states])
    for tensor, other in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True):
        other.copy_(tensor.normal_())
    chooser = random.Random(0)
    for count in (1, 2, 3, 17, 64, 70, 1):
        rows, counts, places = [], [], []
        for number in range(count):
            table = BlockTable(8)
            blocks = [2 * number, 2 * number + 1]
            table.extend(blocks if chooser.random() < 0.5 else blocks[::-1])
            size = chooser.randint(1, 5) if chooser.random() < 0.95 else 9
            rows.append(ForwardRow([chooser.randrange(9) for _ in range(size)], chooser.randint(0, 3), table))
            counts.append(chooser.randint(1, 4))
            places.append(chooser.randint(0, 390))
        with torch.inference_mode():
            ours, theirs = captured(rows, counts, places), plain(rows, counts, places)
        for number, own in enumerate(counts):
            torch.testing.assert_close(ours[:own, number], theirs[:own, number], **limits)
        torch.testing.assert_close(caches[0].keys[0], caches[1].keys[0], **limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_loop_follows_what_was_accepted_on_the_device(dtype: torch.dtype) -> None:
    """It drafts what a loop drafts that knows how many of a row's tokens came."""
    layer = Layer().to(GPU, dtype)
    caches = [KVCache([KVLayer(KV_HEADS, DIM, DIM)], 4 * 66, 8, dtype, GPU) for _ in range(2)]
    limits: dict[str, Any] = {"atol": 8 * TOLERANCE[dtype], "rtol": 8 * TOLERANCE[dtype]}

    def begin(batch: Any, ids: torch.Tensor, last: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        spread = torch.linspace(0.1, 1.0, WIDTH, device=ids.device, dtype=dtype)
        output = layer.step(batch, ids[:, None].to(dtype) * spread)[0][last]
        return [output], output

    def step(batch: Any, state: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        output = layer.step(batch, state)[0]
        return [output], output

    accepted = PendingTokens(64 * 5, 100, GPU)
    captured = compile_loop(begin, step, caches[0], 3, accepted=accepted)
    assert isinstance(captured, CapturedLoop)
    plain = plain_loop(begin, step, caches[1], 3)
    chooser = random.Random(0)
    for count in (1, 2, 3, 17, 64, 5):
        for tensor, other in zip(
            (*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True
        ):
            other.copy_(tensor.normal_())
        lengths = [chooser.randint(1, 4) for _ in range(count)]
        decided = [[chooser.randrange(length), *(chooser.randrange(9) for _ in range(4))] for length in lengths]
        pending = accepted.put(torch.tensor(decided, device=GPU), [1 + length for length in lengths])
        rows, counts = [], []
        for number, row in enumerate(pending):
            table = BlockTable(8)
            blocks = [4 * number + block for block in range(4)]
            table.extend(blocks if chooser.random() < 0.5 else blocks[::-1])
            if chooser.random() < 0.8:
                upcoming = UpcomingTokens(row)
                rows.append(ForwardRow(upcoming.placeholders, chooser.randint(0, 20), table, upcoming=upcoming))
            else:
                rows.append(ForwardRow([chooser.randrange(9) for _ in range(lengths[number])], 9, table))
            counts.append(chooser.randint(1, 3))
        with torch.inference_mode():
            ours, theirs = captured(rows, counts).clone(), plain(rows, counts)
        for number, own in enumerate(counts):
            torch.testing.assert_close(ours[:own, number], theirs[:own, number], **limits)


START = """
import sys
from specplug import LLM
LLM(sys.argv[1], skip_tokenizer_init=True, dtype="bfloat16", compile=True, max_num_seqs=4, memory="256MiB").close()
"""


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    """Neither graphs nor single kernels: nothing new is written."""
    folder = save_model(tmp_path / "llama", "llama", hidden_size=64, head_dim=32)
    home = tmp_path / "home"
    settings = {name: value for name, value in os.environ.items() if "CACHE_DIR" not in name}
    settings |= {"SPECPLUG_CACHE": str(home / "specplug"), "HOME": str(home), "TMPDIR": str(tmp_path)}
    written: list[set[Path]] = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", START, folder], env=settings, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        written.append({path for path in home.rglob("*") if path.is_file()})
    assert any("triton" in path.parts for path in written[0])
    assert written[1] == written[0]
