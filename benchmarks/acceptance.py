"""Acceptance lengths of several speculative configurations at several temperatures, on the same prompts.

    python benchmarks/acceptance.py '{"method": "draft_model"}' '{"method": "draft_model", "draft_sample_method": "greedy"}'

Nothing is timed. Every figure is tokens per target forward that verified a draft, the bonus token included, with its standard
error over prompts; requests have no seed, so that the rule that accepts most is used. Every temperature has an engine of its
own: a method that learns from requests has seen no prompt before.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from workloads import WORKLOADS

from specplug import LLM, SamplingParams, resolve_model


def measure(llm: LLM, prompts: list[list[int]], temperature: float, tokens: int) -> tuple[float, float, float]:
    """(τ, its standard error over prompts, draft tokens per step)."""
    params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    counts = [output.outputs[0].metrics for output in outputs]
    steps = sum(count.num_spec_steps for count in counts)
    tau = 1 + sum(count.num_accepted_draft_tokens for count in counts) / steps
    # Standard error of a ratio of sums, by the linearised residuals.
    residuals = [c.num_accepted_draft_tokens - (tau - 1) * c.num_spec_steps for c in counts]
    error = statistics.stdev(residuals) * math.sqrt(len(counts)) / steps
    return tau, error, sum(count.num_draft_tokens for count in counts) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="speculative configurations, as JSON")
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 1.0])
    parser.add_argument("--workload", choices=list(WORKLOADS), default="continuing")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--chain-verification", default="block", choices=["block", "standard"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(args.target))
    prompts = WORKLOADS[args.workload](tokenizer, args.prompts)
    rows: list[dict[str, Any]] = []
    for text in args.configs:
        options: dict[str, Any] = {
            "dtype": args.dtype,
            "max_num_seqs": args.batch,
            "max_model_len": 1024,
            "max_num_batched_tokens": 2048,
            "memory": "8GiB",
            "chain_verification": args.chain_verification,
        }
        for temperature in args.temperatures:
            with LLM(args.target, speculative_config=json.loads(text), **options) as llm:
                tau, error, drafted = measure(llm, prompts, temperature, args.tokens)
                rows.append(
                    {"config": text, "temperature": temperature, "tau": round(tau, 3), "error": round(error, 3)}
                )
                print(
                    f"T={temperature:<4} tau {tau:.3f} ± {error:.3f}, {drafted:.1f} drafted a step: {text}", flush=True
                )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
