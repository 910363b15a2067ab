"""What the prefix cache saves and costs: time to first token after a shared prefix, and time on prompts that share nothing.

    python benchmarks/prefix_cache.py tiny --json build/prefix-cache.json

Two engines, with and without the cache, take turns, so that other load on the machine falls on both; what the cache costs
without hits is a ratio of processor times. `--method` adds a speculator whose KV is cached too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from specplug import LLM, SamplingParams
from specplug.bench.report import describe_machine
from specplug.model.device import choose_device
from specplug.request import Request

_TAIL = 20


class Prompts:
    """Random prompts of one length; no two share a block."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self._random = random.Random(0)
        self._vocabulary = vocabulary
        self.length = length

    def ids(self, count: int) -> list[int]:
        """Random ids."""
        return [self._random.randrange(3, self._vocabulary) for _ in range(count)]


@attrs.frozen
class Run:
    """One request alone.

    Attributes:
        first: seconds to its first token.
        first_processor: processor time to it.
        other_processor: processor time of all steps after it.
    """

    first: float
    first_processor: float
    other_processor: float


def run(llm: LLM, prompt: list[int], tokens: int) -> Run:
    """Serves one request alone."""
    engine = llm.engine
    begin, processor = time.perf_counter(), time.process_time()
    (request,) = engine.add_request(
        "measured", prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    )
    while not request.num_output_tokens:
        engine.step()
    first, middle = time.perf_counter() - begin, time.process_time()
    while engine.has_unfinished_requests:
        engine.step()
    return Run(first, middle - processor, time.process_time() - middle)


def shared_prefix(cached: LLM, prompts: Prompts, rounds: int) -> dict[str, float]:
    """The time to first token with a cached prefix over that of the first such prompt."""
    cold, warm = [], []
    for _ in range(rounds):
        trunk = prompts.ids(prompts.length)
        cold.append(run(cached, trunk + prompts.ids(_TAIL), 1).first)
        warm.append(run(cached, trunk + prompts.ids(_TAIL), 1).first)
    ratios = [one / other for one, other in zip(warm, cold, strict=True)]
    return {
        "cold_ms": 1e3 * statistics.median(cold),
        "warm_ms": 1e3 * statistics.median(warm),
        "warm_over_cold": statistics.median(ratios),
    }


def no_hits(cached: LLM, plain: LLM, prompts: Prompts, rounds: int, tokens: int) -> dict[str, float]:
    """Processor time with the cache over that without it, on prompts that share nothing; the cache is full and evicts."""
    firsts: list[tuple[float, float]] = []
    steps: list[tuple[float, float]] = []
    allocator = cached.engine.scheduler.allocator
    while allocator.num_blocks - allocator.cached.num_idle > prompts.length // cached.engine.plan.block_size:
        run(cached, prompts.ids(prompts.length), 1)
    for number in range(rounds):
        order = [cached, plain] if number % 2 else [plain, cached]
        prompt = prompts.ids(prompts.length)
        runs = {llm is cached: run(llm, prompt, tokens) for llm in order}
        firsts.append((runs[True].first_processor, runs[False].first_processor))
        steps.append((runs[True].other_processor, runs[False].other_processor))
    return {
        "prefill_ratio": statistics.median(one / other for one, other in firsts),
        "decode_ratio": statistics.median(one / other for one, other in steps),
    }


class Stopwatch:
    """Times the cache's own calls; medians, since a call that waits for a core says nothing of the cache."""

    def __init__(self, llm: LLM) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in ("find", "store", "store_entries")}
        cache: Any = llm.engine.prefix_cache
        for name in self.seconds:
            setattr(cache, name, self._timed(getattr(cache, name), self.seconds[name]))

    @staticmethod
    def _timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = call(*arguments)
            seconds.append(time.perf_counter() - begin)
            return result

        return timed

    def take(self, *names: str) -> float:
        """The sum of some calls' median microseconds, since the last time."""
        total = sum(statistics.median(self.seconds[name]) for name in names if self.seconds[name])
        for seconds in self.seconds.values():
            seconds.clear()
        return 1e6 * total


def own_time(cached: LLM, prompts: Prompts, rows: int, tokens: int) -> dict[str, float]:
    """Microseconds of the cache's own calls: to look a prompt up, and in a step in which a batch decodes."""
    engine = cached.engine
    watch = Stopwatch(cached)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    family: list[Request] = []
    for number in range(rows):
        family += engine.add_request(str(number), prompts.ids(prompts.length), params)
    while any(not request.num_output_tokens for request in family):
        engine.step()
    prompt = watch.take("find")
    while len(engine.scheduler.running) == rows:
        engine.step()
    step = watch.take("store", "store_entries")
    engine.abort(*(request.id for request in family))
    return {"rows": rows, "us_per_prompt": prompt, "us_per_decode_step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument(
        "--method", type=json.loads, metavar="JSON", help="a speculative_config; default: plain decoding"
    )
    parser.add_argument("--prefix", type=int, default=1000, help="tokens of the shared prefix")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of prompts without hits")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=16, help="rows of the decode steps whose cost is measured")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--memory", default="2GiB", help="of each engine; all of the cache is filled")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options: dict[str, Any] = {
        "speculative_config": args.method,
        "dtype": args.dtype,
        "skip_tokenizer_init": True,
        "max_num_seqs": args.rows,
        "max_model_len": args.prefix + _TAIL + args.tokens + 16,
        "memory": args.memory,
    }
    with LLM(args.target, **options) as cached, LLM(args.target, enable_prefix_caching=False, **options) as plain:
        vocabulary = cached.engine.runner.architecture.vocab_size
        prompts = Prompts(vocabulary, args.prefix)
        for llm in (cached, plain):  # warm
            run(llm, prompts.ids(args.prefix), args.tokens)
        result = {
            "target": args.target,
            "method": None if args.method is None else args.method["method"],
            "prefix_tokens": args.prefix,
            "machine": describe_machine(choose_device("auto")),
            **shared_prefix(cached, prompts, args.rounds),
            **no_hits(cached, plain, prompts, args.rounds, args.tokens),
            **own_time(cached, prompts, args.rows, args.tokens),
        }
    print(json.dumps(result, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
