"""specplug against vLLM (and Transformers) on the same weights, in one run.

    benchmarks/peers/setup_vllm.sh                      # once: vLLM's own environment, in build/vllm-env
    python benchmarks/grow.py tiny 256M --out build/grown-256m
    python benchmarks/against_vllm.py build/grown-256m --json build/against-vllm-256m.json

Every repetition runs all contestants one after the other, on the same prompts, in bfloat16, to the same number of tokens;
a fixed number of requests is under way at any time. vLLM's processes are stopped while others are measured. Every contestant
has one run that does not count. Reported are median tokens per second, prompts included, and the medians of the ratios
specplug / peer within repetitions with their 95 % bootstrap intervals, of these speeds and of the median time between two
tokens, prompts not included; what a peer cannot do is n/a. `--context` makes random prompts so long, for a target that is
given the positions (only costs matter then). Drafts are as long as the peer's; `--auto` adds every method with lengths that
specplug chooses, which is its default.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from peers.vllm_contestant import MODES, VllmContestant
from positions import with_positions
from workloads import WORKLOADS

from specplug import resolve_model
from specplug.bench.comparison import Comparison, Watcher, compare_open, open_contestant
from specplug.bench.contestants import PLAIN, Contestant, EngineContestant
from specplug.bench.peers import method_model, transformers_contestants
from specplug.bench.report import About, as_json, describe_machine, describe_versions
from specplug.bench.summary import paired_ratio, summarize
from specplug.bench.workload import BenchPrompt, Cell, Workload

METHODS = ("ngram", "draft_model", "eagle3")
COUNTERPARTS = {
    PLAIN: "transformers generate",
    "ngram": "transformers prompt lookup",
    "draft_model": "transformers assisted generation",
}
AUTO = " auto"
MAX_MODEL_LEN = 1024
_BLOCK = 64


def configs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The methods' configurations, for specplug and vLLM alike."""
    known: dict[str, dict[str, Any]] = {
        "ngram": {"num_speculative_tokens": args.ngram_tokens, "prompt_lookup_max": 4, "prompt_lookup_min": 1},
        "draft_model": {"num_speculative_tokens": args.draft_tokens, "model": args.draft},
        "eagle3": {"num_speculative_tokens": args.draft_tokens, "model": args.head},
    }
    for method in ("draft_model", "eagle3"):
        known[method]["model"] = method_model(method, known[method]["model"])
    return {method: {"method": method, **known[method]} for method in METHODS if method in args.modes}


def make_contestants(args: argparse.Namespace, target: str) -> list[Contestant]:
    """Plain decoding and the methods of specplug, of vLLM, and of Transformers."""
    batch = max(args.batches)
    own = {
        "dtype": "bfloat16",
        "device": "cpu",
        "max_num_seqs": batch,
        "max_model_len": args.max_model_len,
        "memory": args.memory,
    }
    theirs = {
        "model": target,
        "dtype": "bfloat16",
        "max_num_seqs": batch,
        "max_model_len": args.max_model_len,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    chosen = configs(args)
    contestants: list[Contestant] = [EngineContestant(PLAIN, target, None, own)]
    contestants += [EngineContestant(method, target, config, own) for method, config in chosen.items()]
    if args.auto:
        for method, config in chosen.items():
            lengths = config | {"num_speculative_tokens": "auto"}
            contestants.append(EngineContestant(method + AUTO, target, lengths, own))
    for method, config in {PLAIN: None, **chosen}.items():
        if "vllm" in args.peers:
            label = vllm_label(method)
            if args.vllm_draft_sampling and config is not None and method != "ngram":
                config = config | {"draft_sample_method": args.vllm_draft_sampling}
            log = args.logs / f"{label.replace(' ', '-')}.log"
            contestants.append(
                VllmContestant(label, args.python, config, theirs, threads=args.threads, mode=args.vllm_mode, log=log)
            )
    if "transformers" in args.peers:
        contestants += transformers_contestants(target, list(chosen.values()), own)
    return contestants


def vllm_label(method: str) -> str:
    """How a contestant of vLLM's is called."""
    return "vLLM plain" if method == PLAIN else f"vLLM {method}"


def ratios(comparison: Comparison, methods: list[str]) -> list[dict[str, Any]]:
    """specplug by its counterparts, method by method."""
    rows = []
    labels = {contestant.label for contestant in comparison.contestants}
    for cell in comparison.cells:
        for method in methods:
            base = method.removesuffix(AUTO)
            for peer in (vllm_label(base), COUNTERPARTS.get(base)):
                if peer not in labels:
                    continue
                own, other = (comparison.runs[cell, label] for label in (method, peer))
                speeds = [[run.tokens_per_second for run in runs] for runs in (own, other)]
                paces = [[1 / statistics.median(run.token_seconds) for run in runs] for runs in (own, other)]
                rows.append(
                    {
                        "batch": cell.batch,
                        "temperature": cell.temperature,
                        "method": method,
                        "peer": peer,
                        "ratio": paired_ratio(*speeds).as_json(4) if all(speeds) else None,
                        "between_tokens": paired_ratio(*paces).as_json(4) if all(paces) else None,
                    }
                )
    return rows


def show(name: str, report: dict[str, Any]) -> None:
    """One workload's figures."""
    print(f"\n{name}")
    for result in report["results"]:
        setting = f"batch {result['batch']:<3} T={result['temperature']:<4g}"
        if result["not_available"]:
            print(f"  {setting} {result['method']:<34} n/a: {result['not_available']}")
            continue
        speed, ratio = result["tokens_per_second"], result["ratio_to_plain"]
        tau, pace = result["acceptance_length"], result["inter_token_seconds"]
        print(
            f"  {setting} {result['method']:<34} {speed['median']:9.1f} tokens/s  {ratio['median']:.2f} x plain "
            f"({ratio['low']:.2f} to {ratio['high']:.2f})  {1e3 * pace['p50']:.1f} ms between tokens"
            + (f"  tau {tau:.2f}" if tau else "")
        )
    for row in report["ratios"]:
        ratio, pace = row["ratio"], row["between_tokens"]
        told = "n/a"
        if ratio is not None:
            told = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            told += f", between tokens {pace['median']:.2f} ({pace['low']:.2f} to {pace['high']:.2f})"
        print(f"  batch {row['batch']:<3} T={row['temperature']:<4g} {row['method']} / {row['peer']}: {told}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="tiny", help="a checkpoint's folder, or tiny")
    parser.add_argument("--python", type=Path, default=Path("build/vllm-env/bin/python"), help="vLLM's interpreter")
    parser.add_argument("--peers", nargs="*", choices=["vllm", "transformers"], default=["vllm", "transformers"])
    parser.add_argument("--modes", nargs="*", choices=METHODS, default=list(METHODS), help="beside plain decoding")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--context", type=int, help="tokens of each random prompt")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--ngram-tokens", type=int, default=5)
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--auto", action="store_true", help="each method also with lengths that specplug chooses")
    parser.add_argument("--draft", default="tiny", help="of draft_model")
    parser.add_argument("--head", default="tiny", help="of eagle3; a grown target needs a grown head")
    parser.add_argument("--memory", default="3GiB", help="of each of specplug's engines")
    parser.add_argument("--vllm-mode", choices=MODES, default=MODES[0], help="how its processes are arranged")
    parser.add_argument(
        "--vllm-draft-sampling",
        choices=["greedy", "probabilistic"],
        help="vLLM's draft_sample_method; by itself greedy",
    )
    parser.add_argument("--logs", type=Path, default=Path("build/peers"), help="where vLLM's own output goes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if "vllm" in args.peers and not args.python.is_file():
        parser.error(f"there is no {args.python}; run benchmarks/peers/setup_vllm.sh, or give --python or --peers")
    if args.context and args.workloads != ["random"]:
        parser.error("--context is for --workloads random alone")
    args.max_model_len = max(MAX_MODEL_LEN, -(-((args.context or 0) + args.tokens + 1) // _BLOCK) * _BLOCK)
    args.python = args.python.absolute()  # not resolved: a virtual environment is found by the link
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    target = str(Path(resolve_model(args.target)).absolute())
    if args.context:
        target = str(with_positions(Path(target), args.max_model_len))
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    cells = [Cell(batch, temperature) for temperature in args.temperatures for batch in args.batches]
    contestants = make_contestants(args, target)
    started = time.monotonic()

    def note(text: str) -> None:
        print(f"{time.monotonic() - started:7.0f} s  {text}", file=sys.stderr, flush=True)

    def opening(contestant: Contestant) -> Any:
        note(f"starting {contestant.label}")
        return lambda report: None

    watcher = Watcher(on_open=opening, on_run=lambda c, cell, number: note(f"{c.label}, {cell}, repetition {number}"))
    reports = {}
    with ExitStack() as stack:
        if args.context:
            stack.callback(shutil.rmtree, target)
        for contestant in contestants:
            open_contestant(contestant, stack, watcher)
        vllm = next((c.version for c in contestants if isinstance(c, VllmContestant) and c.version), None)
        for name in args.workloads:
            note(f"== {name}")
            length = {"length": args.context} if args.context else {}
            ids = WORKLOADS[name](tokenizer, args.prompts, **length)
            workload = Workload(name, [BenchPrompt(f"{name} {i}", prompt) for i, prompt in enumerate(ids)], args.tokens)
            comparison = compare_open(contestants, cells, workload, args.repeats, watcher)
            about = About(
                target=args.target,
                dtype="bfloat16",
                device="cpu",
                workload=name,
                prompt_tokens=[len(prompt) for prompt in ids],
                max_tokens=args.tokens,
                repetitions=args.repeats,
                engine={"memory": args.memory, "max_model_len": args.max_model_len, "vllm_mode": args.vllm_mode},
                machine=describe_machine(torch.device("cpu")),
                versions=describe_versions({} if vllm is None else {"vllm": vllm}),
            )
            report = as_json(about, summarize(comparison))
            methods = list(configs(args))
            report["ratios"] = ratios(comparison, [PLAIN, *methods, *(m + AUTO for m in methods if args.auto)])
            reports[name] = report
            show(f"{args.target}, {name}, {about.where}", report)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
