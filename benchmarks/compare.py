"""Wall-clock of several speculative configurations and plain decoding on the same prompts, in one run.

    python benchmarks/compare.py --workload editing draft='{"method": "draft_model"}' \\
        ngram='{"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 1}'

A key "engine" in a configuration holds engine options of that contestant alone. Every repetition runs all contestants one after
the other; reported are median tokens per second, and the median of the ratios to plain decoding within repetitions with the
range of its middle half.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from workloads import WORKLOADS

from specplug import LLM, SamplingParams, resolve_model

PLAIN = "plain"


def run(llm: LLM, prompts: list[list[int]], params: SamplingParams, batch: int) -> float:
    """Seconds for all prompts, `batch` requests at a time."""
    started = time.perf_counter()
    for first in range(0, len(prompts), batch):
        llm.generate(prompts[first : first + batch], params, use_tqdm=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="NAME=JSON", help="speculative configurations")
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="editing")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(args.target))
    prompts = WORKLOADS[args.workload](tokenizer, args.prompts)
    params = SamplingParams(temperature=args.temperature, max_tokens=args.tokens, ignore_eos=True)
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "max_num_seqs": args.batch,
        "max_model_len": 1024,
        "max_num_batched_tokens": max(512, 64 * args.batch),
        "memory": "6GiB",
    }
    configs = {PLAIN: None, **{name: json.loads(text) for name, _, text in (c.partition("=") for c in args.configs)}}
    own = {name: config.pop("engine", {}) if config else {} for name, config in configs.items()}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(LLM(args.target, speculative_config=config, **options | own[name]))
            for name, config in configs.items()
        }
        for llm in engines.values():
            run(llm, prompts[: args.batch], params, args.batch)
            llm.engine.stats = type(llm.engine.stats)()
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(args.repeats):
            for name, llm in engines.items():
                seconds[name].append(run(llm, prompts, params, args.batch))
        rows = []
        for name, llm in engines.items():
            ratios = sorted(p / own for p, own in zip(seconds[PLAIN], seconds[name], strict=True))
            stats = llm.engine.stats
            row = {
                "contestant": name,
                "tokens_per_second": round(len(prompts) * args.tokens / statistics.median(seconds[name]), 1),
                "ratio_to_plain": round(statistics.median(ratios), 3),
                "middle_half": [round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
                "tau": round(1 + stats.num_accepted_draft_tokens / stats.num_spec_steps, 3)
                if stats.num_spec_steps
                else None,
                "tokens_per_step": round(len(prompts) * args.tokens * args.repeats / max(1, stats.num_steps), 3),
            }
            rows.append(row)
            print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"options": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
