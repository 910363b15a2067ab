"""What one forward of a target costs on this machine, against what its memory and its matrix units allow.

    python benchmarks/step_costs.py build/grown-256m --json build/steps-256m.json

Decoding one row against the number of tokens verified, and against the length of its context; sixteen rows; prefill; and the
parts of a step that are not a forward. Beside every figure stands a measurement of the hardware taken in the same second:
reading memory with all threads, and a bfloat16 matrix product. Weights do not matter here: `--positions` gives the model
more positions than its checkpoint has.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from positions import with_positions

from specplug import LLM, SamplingParams
from specplug.bench.report import describe_machine
from specplug.model.huge_pages import allocate
from specplug.model.kv_cache import BlockTable
from specplug.model.rows import ForwardRow

_TOKENS = (1, 2, 4, 6, 8, 16, 32, 64)
_CONTEXTS = (128, 1024, 4096, 16000)


def median_seconds(run: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median of the time that a clock shows; `time.thread_time` counts what one thread computes."""
    run()
    times = []
    for _ in range(repeats):
        started = clock()
        run()
        times.append(clock() - started)
    return statistics.median(times)


class Machine:
    """What the hardware gives at the moment it is asked."""

    def __init__(self, read_bytes: int = 1 << 30) -> None:
        self._memory = allocate(read_bytes // 4, torch.float32).fill_(1)
        self._left = torch.randn(512, 4096, dtype=torch.bfloat16)
        self._right = torch.randn(4096, 4096, dtype=torch.bfloat16)

    def read_bandwidth(self, measure: Callable[..., float] = median_seconds) -> float:
        """Bytes per second of the fastest operation that only reads, over more memory than any cache holds, in large pages."""
        one, other = self._memory.chunk(2)
        return self._memory.nbytes / measure(lambda: torch.dot(one, other), 3)

    def matrix_rate(self) -> float:
        """Operations per second of a bfloat16 product."""
        seconds = median_seconds(lambda: torch.nn.functional.linear(self._left, self._right), 5)
        return 2 * 512 * 4096 * 4096 / seconds


class Steps:
    """Forwards of one engine's target, without the engine around them."""

    def __init__(self, llm: LLM, longest: int) -> None:
        self.runner = llm.engine.runner
        self.weight_bytes = sum(
            tensor.nbytes for name, tensor in self._tensors().items() if "embed" not in name or "packed" in name
        )
        self.kv_bytes = sum(layer.elements for layer in self.runner.cache.layers) * self.runner.cache.keys[0].itemsize
        self._ids = torch.randint(3, self.runner.architecture.vocab_size, (4096,)).tolist()
        block_size = llm.engine.config.block_size
        blocks = -(-longest // block_size)
        self.tables = []
        for row in range(self.runner.cache.num_slots // (blocks * block_size)):
            table = BlockTable(block_size)
            table.extend(range(row * blocks, (row + 1) * blocks))
            self.tables.append(table)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self.runner.model.named_parameters()), **dict(self.runner.model.named_buffers())}

    def decode(self, rows: int, tokens: int, context: int) -> None:
        """Every row runs so many tokens behind so much context; logits for all of them."""
        self.runner.forward([ForwardRow(self._ids[:tokens], context, table) for table in self.tables[:rows]])

    def prefill(self, tokens: int) -> None:
        """The first tokens of one row; logits for the last."""
        self.runner.forward([ForwardRow(self._ids[:tokens], 0, self.tables[0])], [tokens - 1])


def measure(target: Path, positions: int | None, repeats: int, dtype: str, memory: str) -> dict[str, Any]:
    folder = target if positions is None else with_positions(target, positions)
    machine = Machine()
    started = time.perf_counter()
    llm = LLM(
        folder, dtype=dtype, skip_tokenizer_init=True, memory=memory, max_num_seqs=16, max_num_batched_tokens=1024
    )
    seconds_to_start = time.perf_counter() - started
    longest = min(llm.engine.plan.max_model_len, max(_CONTEXTS) + 64)
    contexts = [context for context in _CONTEXTS if context + 64 <= longest]
    steps = Steps(llm, longest)
    report: dict[str, Any] = {
        "target": str(target),
        "machine": describe_machine(llm.engine.runner.device),
        "compiled": llm.engine.runner.compiled is not None,
        "weight_bytes_read": steps.weight_bytes,
        "seconds_to_start": seconds_to_start,
    }
    with torch.inference_mode():
        one, by_tokens = [], {tokens: [] for tokens in _TOKENS}
        share: list[float] = []
        for _ in range(repeats):
            for tokens in _TOKENS:
                by_tokens[tokens].append(median_seconds(lambda n=tokens: steps.decode(1, n, 128), 5))
            one.append(by_tokens[1][-1])
            read = steps.weight_bytes + 129 * steps.kv_bytes
            share.append(read / one[-1] / machine.read_bandwidth())
        first = statistics.median(one)
        report["one_token_ms"] = first * 1e3
        report["share_of_read_bandwidth"] = statistics.median(share)
        report["by_tokens"] = {
            str(n): {
                "ms": statistics.median(times) * 1e3,
                "ratio": statistics.median(t / o for t, o in zip(times, one, strict=True)),
            }
            for n, times in by_tokens.items()
        }
        by_context: dict[int, list[float]] = {context: [] for context in contexts}
        bandwidths = []
        for _ in range(repeats):
            for context in contexts:
                by_context[context].append(median_seconds(lambda c=context: steps.decode(1, 1, c), 5))
            bandwidths.append(machine.read_bandwidth())
        report["read_gb_s"] = statistics.median(bandwidths) / 1e9
        report["by_context"] = {
            str(context): {
                "ms": statistics.median(times) * 1e3,
                "added_ms": statistics.median(t - o for t, o in zip(times, by_context[contexts[0]], strict=True)) * 1e3,
                "kv_read_ms": (context - contexts[0]) * steps.kv_bytes / statistics.median(bandwidths) * 1e3,
            }
            for context, times in by_context.items()
        }
        many = min(16, len(steps.tables))
        report["rows"] = {"rows": many, "ms": median_seconds(lambda: steps.decode(many, 1, 128), 5 * repeats) * 1e3}
        rates = []
        matrix_weights = steps.weight_bytes / llm.engine.runner.cache.keys[0].itemsize
        for _ in range(repeats):
            seconds = median_seconds(lambda: steps.prefill(1024), 1)
            rates.append(2 * 1024 * matrix_weights / seconds / machine.matrix_rate())
        report["prefill_share_of_matrix_rate"] = statistics.median(rates)
    report["outside_the_forward_us"] = {str(rows): outside_the_forward(llm, rows) for rows in (1, 16)}
    llm.close()
    if positions is not None:
        shutil.rmtree(folder)
    return report


def outside_the_forward(llm: LLM, rows: int) -> float:
    """Median microseconds of processor time that a greedy decoding step spends outside the target's forward."""
    engine, spent, others = llm.engine, [0.0], []
    forward = engine.runner.forward

    def timed(*arguments: Any, **options: Any) -> torch.Tensor:
        started = time.thread_time()
        logits = forward(*arguments, **options)
        spent[0] = time.thread_time() - started
        return logits

    engine.runner.forward = timed  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True, detokenize=False)
    for row in range(rows):
        engine.add_request(str(row), list(range(3 + row, 43 + row)), params)
    while engine.has_unfinished_requests:
        started = time.thread_time()
        engine.step()
        others.append((time.thread_time() - started - spent[0]) * 1e6)
    engine.runner.forward = forward  # type: ignore[method-assign]
    return statistics.median(others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--positions", type=int, help="more positions than the checkpoint has")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", default="9GiB", help="of the engine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = measure(arguments.target, arguments.positions, arguments.repeats, arguments.dtype, arguments.memory)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
