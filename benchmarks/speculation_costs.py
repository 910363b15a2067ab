"""What a speculator's drafts cost and bring: acceptance, step costs, speed-up, beside what the cost model promises.

    python benchmarks/speculation_costs.py --target tiny --method draft_model --gammas 1 2 3 4 5 6 7 8 --json build/costs.json

For every draft length γ, with temperature 0 and one request at a time, interleaved with plain decoding by the same engine (two
copies of the same weights differ in speed by some per cent); prompts, which take the same either way, are not counted:

* τ: tokens per target forward that verified a draft, the bonus token included;
* t₁, t_verify: the target's bare forward over 1 and over 1 + γ tokens, in the same engine at the same context;
* t_draft: the speculator's `propose`, the whole hook;
* the speed-up against plain decoding (all tokens but each request's first, median of the ratios within repetitions);
* the cost model, τ · t₁ / (t_verify + t_draft) where every step verifies a full draft: plain decoding's forwards, divided by
  the forwards of as many tokens as were really verified, and the drafting. And Leviathan's
  (1 − α^(γ+1)) / ((1 − α)(γc + 1)) with α from the measured τ and c = t_draft / (γ t₁) (2211.17192, theorem 3.8).

A grown target (benchmarks/grow.py) has a big model's costs and the small model's acceptance.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from workloads import CODE, WORKLOADS

from specplug import LLM, ForwardRow, SamplingParams, __version__, resolve_model
from specplug.stats import SpeculationStats


def run(llm: LLM, prompts: list[list[int]], tokens: int, *, plain: bool = False) -> float:
    """Seconds from every prompt's first token to its last, one request at a time."""
    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, num_speculative_tokens=0 if plain else None
    )
    seconds = 0.0
    for prompt in prompts:
        metrics = llm.generate([prompt], params, use_tqdm=False)[0].metrics
        assert metrics.finished_time is not None
        assert metrics.first_token_time is not None
        seconds += metrics.finished_time - metrics.first_token_time
    return seconds


def forward_seconds(llm: LLM, count: int, context: int, repeats: int) -> float:
    """Median time of the target's bare forward over `count` new tokens behind `context` cached ones."""
    engine = llm.engine
    blocks = engine.scheduler.allocator.allocate(-(-(context + count) // engine.plan.block_size))
    assert blocks is not None
    from specplug import BlockTable

    table = BlockTable(engine.plan.block_size)
    table.extend(blocks)
    row = ForwardRow([5] * count, context, table)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        engine.runner.forward([row])
        times.append(time.perf_counter() - started)
    engine.scheduler.allocator.release(blocks)
    return statistics.median(times)


def solve_alpha(tau: float, gamma: int) -> float:
    """The acceptance rate that gives an acceptance length, if every position were accepted alike."""
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - middle ** (gamma + 1)) / (1 - middle) < tau else (low, middle)
    return low


def describe(
    gamma: int,
    stats: SpeculationStats,
    costs: Mapping[str, Sequence[float]],
    ratios: Sequence[float],
    num_requests: int,
    num_tokens: int,
) -> dict[str, Any]:
    """One line of the table.

    Args:
        gamma: the draft length.
        stats: of the steps that drafted or might have.
        costs: medians of the repetitions: `t1`, `t_verify`, `t_draft`.
        ratios: the speed-ups.
        num_requests: that were served; each began with a step that computed its prompt, and is not counted.
        num_tokens: that each of them brought.
    """
    tau = 1 + stats.num_accepted_draft_tokens / max(1, stats.num_spec_steps)
    t1, verify, draft = (statistics.median(costs[name]) for name in ("t1", "t_verify", "t_draft"))
    alpha, share = solve_alpha(tau, gamma), draft / gamma / t1
    speed_up = statistics.median(ratios)
    filled = stats.num_draft_tokens / gamma  # shorter drafts, at the ends of requests say, take shorter forwards
    steps = stats.num_steps - num_requests
    model = num_requests * (num_tokens - 1) * t1 / (steps * (t1 + draft) + filled * (verify - t1))
    return {
        "gamma": gamma,
        "tau": round(tau, 3),
        "t1_ms": round(t1 * 1e3, 3),
        "t_verify_ms": round(verify * 1e3, 3),
        "t_draft_ms": round(draft * 1e3, 3),
        "speed_up": round(speed_up, 3),
        "cost_model": round(model, 3),
        "of_model": round(speed_up / model, 3),
        "leviathan": round((1 - alpha ** (gamma + 1)) / ((1 - alpha) * (gamma * share + 1)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--method", default="draft_model")
    parser.add_argument("--config", default="{}", help="more keys of speculative_config, as JSON")
    parser.add_argument("--gammas", type=int, nargs="+", default=list(range(1, 9)))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workload", choices=[*WORKLOADS, "mixed"], default="mixed")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(args.target))
    kinds = list(CODE) if args.workload == "mixed" else [args.workload]
    prompts = [p for kind in kinds for p in WORKLOADS[kind](tokenizer, -(-args.prompts // len(kinds)))][: args.prompts]
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 512,
        "max_model_len": 1024,
        "memory": "8GiB",
    }
    extra = json.loads(args.config)
    if args.target != "tiny" and "model" not in extra and args.method != "ngram":
        extra["model"] = "tiny"
    rows = []
    for gamma in args.gammas:
        config = {"method": args.method, "num_speculative_tokens": gamma, **extra}
        with LLM(args.target, speculative_config=config, **options) as llm:
            if any(speculator.traits.learns for speculator in llm.engine.chain.speculators):
                parser.error(f"{args.method} learns from requests, and prompts are repeated here: use specplug bench")
            for is_plain in (True, False):
                run(llm, prompts[:1], 16, plain=is_plain)
            context = len(prompts[0]) + args.tokens // 2
            costs: dict[str, list[float]] = {"t1": [], "t_verify": [], "t_draft": []}
            ratios = []
            engine, drafting = llm.engine, SpeculationStats()
            for _ in range(args.repeats):
                costs["t1"].append(forward_seconds(llm, 1, context, 15))
                costs["t_verify"].append(forward_seconds(llm, 1 + gamma, context, 15))
                plain = run(llm, prompts, args.tokens, plain=True)
                engine.stats, others = drafting, engine.stats
                before, steps = engine.chain.seconds[args.method], engine.num_steps
                ratios.append(plain / run(llm, prompts, args.tokens))
                asked = engine.num_steps - steps - len(prompts)  # the prompts' steps, in which nothing is drafted
                costs["t_draft"].append((engine.chain.seconds[args.method] - before) / max(1, asked))
                engine.stats = others
            rows.append(describe(gamma, drafting, costs, ratios, args.repeats * len(prompts), args.tokens))
            print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    about = {
        "target": args.target,
        "method": args.method,
        "config": extra,
        "dtype": args.dtype,
        "workload": f"{len(prompts)} prompts ({args.workload}), {args.tokens} tokens each, temperature 0",
        "repeats": args.repeats,
        "threads": args.threads,
        "versions": f"specplug {__version__}, torch {torch.__version__}, {platform.machine()}",
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
