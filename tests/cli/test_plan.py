"""`specplug plan`."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from specplug import LLM
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from specplug.model.load import weights
from support.models import save_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DRAFTER = """
import torch
from specplug import KVLayer, MemoryRegion, Proposal, hookimpl

class Drafter:
    @hookimpl
    def plan_memory(self, budget):
        layers = (KVLayer(2, 8, 8), KVLayer(1, 8, 4))
        return [
            MemoryRegion("weights", "weights", fixed_bytes=4096),
            MemoryRegion("cache", "kv_cache", layers=layers, dtype=torch.float32, scratch_tokens_per_row=9),
            MemoryRegion("table", "buffers", fixed_bytes=1000),
        ]

    @hookimpl
    def warmup(self, resources):
        self.weights = torch.zeros(4096, dtype=torch.uint8)
        self.table = torch.zeros(1000, dtype=torch.uint8)
        self.caches = resources.kv_caches

    @hookimpl
    def propose(self, batch):
        return Proposal([[] for _ in batch.rows])

@hookimpl
def load_speculator(config, target):
    print("noise from a plugin")
    return Drafter()
"""
CONFIG = '{"method": "drafter", "num_speculative_tokens": 3}'
OPTIONS = ("--memory", "2MiB", "--max-model-len", "100", "--max-num-seqs", "6", "--max-num-batched-tokens", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def drafter(installed: Callable[..., None]) -> str:
    installed("acme-drafter", methods={"drafter": ""}, source=DRAFTER)
    return CONFIG


def test_the_plan_is_what_the_engine_allocates(run: Callable[..., Any], folder: Path, drafter: str) -> None:
    result = run("plan", str(folder), "--json", "--speculative-config", drafter, *OPTIONS, "--block-size", "8")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    options: dict[str, Any] = {
        "speculative_config": json.loads(drafter),
        "memory": "2MiB",
        "max_model_len": 100,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 64,
        "block_size": 8,
    }
    planned = plan_engine(EngineConfig.create(str(folder), **options))
    with LLM(folder, skip_tokenizer_init=True, **options) as llm:
        engine = llm.engine
        assert engine.plan == planned.plan
        speculator = engine.chain.speculators[0].instance
        tensors = [*engine.runner.model.parameters(), *engine.runner.model.buffers()]
        workspace = engine._verification._workspace
        allocated = {
            "target_weights": sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values()),
            "target_kv": engine.runner.cache.num_bytes,
            "draft_weights": speculator.weights.nbytes,
            "draft_kv": sum(cache.num_bytes for cache in speculator.caches.values()),
            "buffers": speculator.table.nbytes + workspace._probs.nbytes + workspace._noise.nbytes,
        }
        assert shown["parts"] == {**allocated, "adapters": 0}
        assert all(allocated.values())
        assert shown["total_bytes"] == sum(allocated.values()) == engine.plan.total_bytes
        assert shown["num_kv_tokens"] == engine.runner.cache.num_slots
        assert shown["sequences"][0] == {"tokens": 100, "fit_cache": engine.plan.num_blocks // 14, "run_at_once": 6}


def test_no_weight_is_read(run: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "load_model", None)
    monkeypatch.setattr("specplug.engine.startup.allocation.load_model", None)
    monkeypatch.setattr("safetensors.safe_open", None)
    assert run("plan", str(folder)).exit_code == 0


def test_json_keys_are_stable(run: Callable[..., Any], folder: Path, drafter: str) -> None:
    result = run("plan", str(folder), "--json", "--speculative-config", drafter, *OPTIONS)
    shown = json.loads(result.stdout)
    assert list(shown) == [
        "target",
        "architecture",
        "dtype",
        "quantization",
        "device",
        "speculators",
        "budget_bytes",
        "total_bytes",
        "left_bytes",
        "parts",
        "context_length",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "block_size",
        "num_blocks",
        "tensor_parallel_size",
        "other_rank_bytes",
        "num_kv_tokens",
        "target_bytes_per_kv_token",
        "draft_bytes_per_kv_token",
        "scratch_tokens_per_sequence",
        "enable_prefix_caching",
        "other_devices",
        "sequences",
    ]
    assert list(shown["parts"]) == [
        "target_weights",
        "target_kv",
        "draft_weights",
        "draft_kv",
        "buffers",
        "adapters",
    ]
    assert shown["speculators"] == [{"method": "drafter", "max_draft_tokens": 3}]
    assert shown["budget_bytes"] == 2 << 20 == shown["total_bytes"] + shown["left_bytes"]
    assert shown["target_bytes_per_kv_token"] == 3 * 2 * 16 * 4
    assert shown["draft_bytes_per_kv_token"] == (2 * 16 + 12) * 4
    assert shown["scratch_tokens_per_sequence"] == 9
    assert [each["tokens"] for each in shown["sequences"]] == [100, 25]
    assert "noise from a plugin" in result.stderr


def test_it_reads_well(run: Callable[..., Any], folder: Path, drafter: str) -> None:
    text = run("plan", str(folder), "--speculative-config", drafter, *OPTIONS).stdout
    lines = text.splitlines()
    assert re.match(r"Target +.*: LlamaForCausalLM, float32, on ", lines[0])
    assert re.match(r"Speculators +drafter \(3 draft tokens\)$", lines[1])
    for part in ("target weights", "target KV cache", "draft weights", "draft KV cache", "verification buffers"):
        assert re.search(rf"^  {part} .* [KMG]?i?B +\d+%$", text, re.MULTILINE), part
    bar = next(line for line in lines if re.fullmatch(r"  T+K+d+k+v+\.+", line))
    assert len(bar) == 72
    assert (
        "  T target weights, K target KV cache, d draft weights, k draft KV cache, v verification buffers, . left"
        in lines
    )
    assert re.search(r"^Scratch +9 tokens per sequence", text, re.MULTILINE)
    assert re.search(r"^Prefix cache +on$", text, re.MULTILINE)
    assert re.search(
        r"^Longest sequence +100 tokens \(max_model_len; the target has 160 positions\)$", text, re.MULTILINE
    )
    assert re.search(r"^Of 100 tokens +6 sequences at once$", text, re.MULTILINE)
    assert re.search(
        r"^Of 25 tokens +6 sequences at once \(max_num_seqs; the cache would hold 14\)$", text, re.MULTILINE
    )


def test_the_length_that_fits_is_named(run: Callable[..., Any], folder: Path) -> None:
    text = run("plan", str(folder), "--memory", "140KiB", "--block-size", "4").stdout
    assert re.search(
        r"^Longest sequence +\d+ tokens \(what fits the budget; the target has 160 positions\)$", text, re.M
    )
    assert re.search(r"^Of \d+ tokens +1 sequence at once$", text, re.M)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--memory", "150KiB", "--max-model-len", "160"),
            r"one sequence of 160 tokens needs \d+\.\d KiB \(target weights .*, buffers .*, KV cache .*\), and the budget is "
            r"150\.0 KiB; raise memory, or lower max_model_len \(at most \d+ fit\), max_num_seqs \(now 32\) or ",
        ),
        (
            ("--memory", "126KiB"),
            r"one sequence of 16 tokens needs .* or lower max_num_seqs \(now 32\) or max_num_batched",
        ),
        (("--memory", "20KiB"), r"the budget is 20\.0 KiB; raise memory, or take smaller weights or a smaller dtype$"),
    ],
)
def test_what_does_not_fit_is_one_error(
    run: Callable[..., Any], folder: Path, options: tuple[str, ...], message: str
) -> None:
    for extra in ((), ("--json",)):
        result = run("plan", str(folder), *options, *extra)
        assert result.exit_code == 1
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert re.search(message, line), line
