"""What a step of the engine costs on one GPU: an 8B-shaped Llama with random bfloat16 weights, without network.

    python benchmarks/gpu_steps.py [--layers 32] [--json FILE]

Prints JSON: the measured copy bandwidth; milliseconds of a forward over 1,024 cached tokens, for one token, for the
verification of 2 to 64 and of a tree of 64, in four ways (eager, CUDA graphs, compiled, both); engine steps by the wall
clock; the memory plan beside what the process holds; and where the host waits for the GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from specplug import LLM, SamplingParams
from specplug.model.compile.cuda_graphs import CudaGraphs
from specplug.model.compile.trace import weights_of
from specplug.model.kv_cache import BlockTable
from specplug.model.rows import ForwardRow, TreeMask
from specplug.model.runner import ModelRunner

CONTEXT = 1024
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
GPU = torch.device("cuda")


def save_checkpoint(folder: Path, layers: int) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with GPU:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def milliseconds(run: Callable[[], object], repeats: int = 30, warmups: int = 5) -> float:
    """Of the GPU, per call; the median of three series."""
    for _ in range(warmups):
        run()
    series = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        series.append(start.elapsed_time(end) / repeats)
    return statistics.median(series)


def copy_bandwidth() -> float:
    """GB/s read plus written, by the best of three copies of 4 GB."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device=GPU)
    destination = torch.empty_like(source)
    best = min(milliseconds(lambda: destination.copy_(source), 10, 2) for _ in range(3))
    return 2 * source.nbytes / best / 1e6


def bytes_per_step(runner: ModelRunner) -> int:
    """What decoding one token must read: the weights but for the embedding's table, and the row's KV."""
    table = runner.model.get_input_embeddings().weight
    weights = sum(weight.nbytes for weight in weights_of(runner.model).values() if weight is not table)
    per_token = sum(tensor.shape[0] * tensor.shape[2] * tensor.element_size() for tensor in runner.cache_tensors)
    return weights + CONTEXT * per_token


def forwards(runner: ModelRunner, block_size: int) -> dict[str, float]:
    """Milliseconds of a forward, by what it runs."""
    table = BlockTable(block_size)
    table.extend(range(-(-(CONTEXT + 80) // block_size)))
    generator = random.Random(0)
    found = {}
    for count in COUNTS:
        row = ForwardRow([generator.randrange(1000) for _ in range(count)], CONTEXT, table)
        found[str(count)] = milliseconds(lambda row=row: runner.forward([row]))
    parents = [generator.randrange(-1, node) for node in range(63)]
    tree = ForwardRow([5] * 64, CONTEXT, table, TreeMask.from_parents(CONTEXT, parents))
    found["tree of 64"] = milliseconds(lambda: runner.forward([tree]))
    return {name: round(value, 3) for name, value in found.items()}


def four_ways(runner: ModelRunner, block_size: int, most: int) -> dict[str, dict[str, float]]:
    compiled, graphs = runner.compiled, runner.graphs
    results = {"compiled and captured": forwards(runner, block_size)}
    runner.graphs = None
    results["compiled"] = forwards(runner, block_size)
    runner.compiled = None
    results["eager"] = forwards(runner, block_size)
    runner.graphs = CudaGraphs(runner.run_tensors, runner.device, most)
    results["captured"] = forwards(runner, block_size)
    runner.compiled, runner.graphs = compiled, graphs
    return results


def engine_steps(llm: LLM, rows: int) -> dict[str, float]:
    """Wall-clock milliseconds of decoding steps, everything included."""
    generator = random.Random(1)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for row in range(rows):
        llm.engine.add_request(f"{rows}-{row}", [generator.randrange(1000) for _ in range(CONTEXT)], params)
    times = []
    while llm.engine.has_unfinished_requests:
        began = time.perf_counter()
        outputs = llm.engine.step()
        if len(outputs) == rows:
            times.append(1e3 * (time.perf_counter() - began))
    steps = sorted(times[4:-1])
    return {"median ms": round(statistics.median(steps), 3), "p99 ms": round(steps[int(0.99 * (len(steps) - 1))], 3)}


def waits(llm: LLM) -> dict[str, float]:
    """Where the host waits for the GPU, in waits per decoding step."""
    llm.engine.add_request("waits", [3] * 64, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    for _ in range(5):
        llm.engine.step()
    places: Counter[str] = Counter()

    def note(*_: Any, **__: Any) -> None:
        frames = [f for f in traceback.extract_stack() if "specplug" in f.filename and "benchmarks" not in f.filename]
        places[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"] += 1

    show, warnings.showwarning = warnings.showwarning, note
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            for _ in range(20):
                llm.engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = show
    while llm.engine.has_unfinished_requests:
        llm.engine.step()
    return {place: count / 20 for place, count in places.items()}


def memory(llm: LLM, before: int) -> dict[str, Any]:
    held, reserved = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_reserved()
    planned = llm.engine.plan.total_bytes
    return {
        "planned": planned,
        "parts": dict(llm.engine.plan.parts),
        "most allocated": held,
        "reserved": reserved,
        "allocated by planned": round(held / planned, 4),
        "reserved by planned": round(reserved / planned, 4),
    }


def measure(folder: Path, rows: int) -> dict[str, Any]:
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy GB/s": round(copy_bandwidth(), 1),
    }
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    options = {"skip_tokenizer_init": True, "max_model_len": 2048, "max_num_seqs": rows, "compile": True}
    steps: dict[str, float] = {}
    with LLM(
        folder,
        dtype="bfloat16",
        on_step=lambda report: steps.__setitem__(report.name, report.seconds or 0.0),
        **options,
    ) as llm:
        results["start s"] = {name: round(seconds, 1) for name, seconds in steps.items()}
        results["started in s"] = round(time.perf_counter() - began, 1)
        runner = llm.engine.runner
        results["most allocated while starting"] = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        results["is compiled"], results["is captured"] = runner.compiled is not None, runner.graphs is not None
        results["engine steps"] = {str(count): engine_steps(llm, count) for count in (1, 4, rows)}
        results["memory"] = memory(llm, before)
        results["waits per step"] = waits(llm)
        results["forwards ms"] = four_ways(runner, llm.config.block_size, 64)
        needed = bytes_per_step(runner)
        results["bytes per step"] = needed
        best = results["forwards ms"]["compiled and captured"]
        results["GB/s at one token"] = round(needed / best["1"] / 1e6, 1)
        results["of copy bandwidth"] = round(needed / best["1"] / 1e6 / results["copy GB/s"], 3)
        results["engine step of copy bandwidth"] = round(
            needed / results["engine steps"]["1"]["median ms"] / 1e6 / results["copy GB/s"], 3
        )
        results["by one token"] = {name: round(value / best["1"], 3) for name, value in best.items()}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, and take it from here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "config.json").is_file():
            save_checkpoint(folder, arguments.layers)
        results = measure(folder, arguments.rows)
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
