"""Whether automatic draft lengths ever lose: against plain decoding with drafts that are never accepted, and against the best
fixed length with good ones.

    python benchmarks/never_slower.py --target build/33m --batches 1 4 16 --json build/never-slower.json

Within every repetition the prompts are served by all contestants in turn, in an order that is drawn anew: one by one, or from
a queue that keeps as many rows busy as the batch has until all have been taken (where rows draft they end at different
times, so the longer the queue, the less its end counts, where rows are idle). Reported are means of the ratios of the
repetitions' times, with 95 % intervals (Student's t). All lengths, auto's included, are drafted for by one and the same
engine, whose policy is exchanged: two copies of the same weights differ in speed by some per cent, by where they lie in
memory. *Plain* decoding has an engine of its own, so its ratio carries that difference: `--engines` makes the pair anew
several times, and the interval is one of the pairs' means. *Bare* is the drafting engine without its speculators, which takes
that difference away (and what handing out the target's states costs). Which fixed length is best is decided by one half of
the repetitions and measured in the other, and the other way round: the best of several is else also the luckiest.

*Adversarial* speculators are the shipped ones at their full cost, whose drafts are replaced by tokens that the target has
least reason to say: `ngram` (it is made to draft always), `draft_model`, `eagle3`. *Good* ones are the shipped ones as they
are. All prompts are first served once, unmeasured; the policy then knows its costs, as an engine's does that has been up for
some seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from scipy import stats
from workloads import WORKLOADS

from specplug import LLM, SamplingParams, SpeculativeConfig, __version__, hookimpl, resolve_model
from specplug.plugins.registry import PluginRegistry
from specplug.speculation.chain import SpeculatorChain
from specplug.speculation.draft_length import FixedDraftLength
from specplug.stats import SpeculationStats

PLAIN, BARE, AUTO = "plain", "bare", "auto"
METHODS: Mapping[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 1},
    "draft_model": {"method": "draft_model"},
    "eagle3": {"method": "eagle3"},
}


class NeverAccepted:
    """A speculator at its full cost, whose drafts are worthless."""

    def __init__(self, wrapped: Any, token: int) -> None:
        self.traits = wrapped.traits
        self._wrapped = wrapped
        self._token = token

    @hookimpl
    def plan_memory(self, budget: Any) -> Any:
        plan = getattr(self._wrapped, "plan_memory", None)
        return plan(budget) if plan is not None else []

    @hookimpl
    def warmup(self, resources: Any) -> None:
        warmup = getattr(self._wrapped, "warmup", None)
        if warmup is not None:
            warmup(resources)

    @hookimpl
    def propose(self, batch: Any) -> Any:
        proposal = self._wrapped.propose(batch)
        sizes = [min(row.budget.max_nodes, row.budget.max_depth) for row in batch.rows]
        if not self.traits.token_only:  # where a model stops early, the useless draft does
            sizes = [min(size, len(tokens)) for size, tokens in zip(sizes, proposal.tokens, strict=True)]
        return attrs.evolve(
            proposal, tokens=[[self._token] * size for size in sizes], parents=None, scores=None, probs=None
        )


def adversary(method: str, token: int) -> Any:
    """A plugin that loads the shipped one and spoils its drafts."""
    load = PluginRegistry().plugin(method).load_speculator

    def make(config: SpeculativeConfig, target: Any) -> NeverAccepted:
        own = attrs.evolve(config, method=method)
        speculator = load(own, target)
        config.known_options.update(own.known_options)
        return NeverAccepted(speculator, token)

    return make


def without_speculators(llm: LLM) -> SpeculatorChain:
    """A chain that asks nobody, for an engine that was started with speculators."""
    engine = llm.engine
    return SpeculatorChain(
        [],
        engine.chain._states,
        FixedDraftLength(),
        vocab_size=engine.runner.architecture.vocab_size,
        max_model_len=engine.plan.max_model_len,
        max_num_batched_tokens=engine.config.max_num_batched_tokens,
        max_num_draft_tokens=None,
        strict=False,
    )


def requests(args: argparse.Namespace, prompts: list[list[int]]) -> list[tuple[list[int], SamplingParams]]:
    """The prompts, and how many tokens each asks for: half as many up to half as many again, in an order of chance.

    Where all ask for as many, rows that draft nothing go in step from beginning to end, and their prompts are computed
    together: plain decoding then gains by what no queue of requests in life grants it.
    """
    last = max(1, len(prompts) - 1)
    tokens = [round(args.tokens * (1 + args.spread * (2 * place / last - 1))) for place in range(len(prompts))]
    random.Random(0).shuffle(tokens)
    return [
        (prompt, SamplingParams(temperature=args.temperature, max_tokens=count, ignore_eos=True))
        for prompt, count in zip(prompts, tokens, strict=True)
    ]


def serve(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> float:
    """Seconds for a batch of prompts."""
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started


def interval(ratios: list[float], pairs: int = 1) -> dict[str, float]:
    """Mean and half the width of its 95 % interval: over repetitions, or over the means of several pairs of engines."""
    if pairs > 1:
        each = len(ratios) // pairs
        ratios = [statistics.mean(ratios[pair * each : (pair + 1) * each]) for pair in range(pairs)]
    half = stats.t.ppf(0.975, len(ratios) - 1) * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return {"mean": round(statistics.mean(ratios), 4), "plus_minus": round(float(half), 4)}


def against_best(seconds: Mapping[str, list[float]], lengths: Sequence[str]) -> list[float]:
    """Ratios of the best fixed length's time to the automatic one's, either half judged by the other's best length."""
    ratios = []
    for half in (0, 1):
        best = min(lengths, key=lambda name: sum(seconds[name][1 - half :: 2]))
        ratios += [b / a for b, a in zip(seconds[best][half::2], seconds[AUTO][half::2], strict=True)]
    return ratios


def take_turns(
    args: argparse.Namespace, plain: LLM, drafting: LLM, prompts: list[list[int]], batch: int, lengths: Sequence[int]
) -> tuple[dict[str, list[float]], SpeculationStats]:
    """Seconds of every repetition by contestant, for one pair of engines; and what became of automatic drafts."""
    asked = requests(args, prompts)
    groups = [[request] for request in asked] if batch == 1 else [asked]
    chain = drafting.engine.chain
    auto, fixed = chain.policy, FixedDraftLength()
    chains = {PLAIN: plain.engine.chain, BARE: without_speculators(drafting)}
    contestants: dict[str, tuple[LLM, Any, int | None]] = {
        PLAIN: (plain, fixed, None),
        BARE: (drafting, fixed, None),
        AUTO: (drafting, auto, None),
    }
    for length in lengths:
        contestants[str(length)] = (drafting, fixed, length)
    order, counts = list(contestants), SpeculationStats()
    seconds: dict[str, list[float]] = {name: [0.0] * args.repeats for name in contestants}
    for repeat in range(-1, args.repeats):  # the first one does not count
        for group in groups:
            random.shuffle(order)
            for name in order:
                llm, policy, length = contestants[name]
                own = [attrs.evolve(params, num_speculative_tokens=length) for _, params in group]
                llm.engine.chain = chains.get(name, chain)
                llm.engine.chain.policy = policy
                before = llm.engine.stats
                llm.engine.stats = counts if name == AUTO and repeat >= 0 else SpeculationStats()
                took = serve(llm, [prompt for prompt, _ in group], own)
                llm.engine.stats = before
                if repeat >= 0:
                    seconds[name][repeat] += took
    return seconds, counts


def measure(
    args: argparse.Namespace, method: str, batch: int, workload: str, prompts: list[list[int]], *, spoiled: bool
) -> dict[str, Any]:
    """One cell: plain, auto and (for good drafts) fixed lengths, in turn."""
    keys = {**METHODS[method]}
    if args.target != "tiny" and method != "ngram":
        keys["model"] = args.draft
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "max_num_seqs": batch,
        "max_model_len": 1024,
        "max_num_batched_tokens": max(512, 64 * batch),
        "memory": args.memory,
    }
    drafting_options = {**options, "speculative_config": keys}
    if spoiled:
        keys["method"] = "spoiled"
        drafting_options["plugins"] = {"spoiled": adversary(method, args.token)}
    lengths = [] if spoiled else args.lengths
    counts = SpeculationStats()
    seconds: dict[str, list[float]] = {}
    for number in range(args.engines):
        with ExitStack() as stack:
            pair: dict[bool, LLM] = {}
            for drafts in (False, True) if number % 2 == 0 else (True, False):
                pair[drafts] = stack.enter_context(LLM(args.target, **(drafting_options if drafts else options)))
            own, counts = take_turns(args, pair[False], pair[True], prompts, batch, lengths)
        for name, times in own.items():
            seconds.setdefault(name, []).extend(times)
    tokens = sum(params.max_tokens or 0 for _, params in requests(args, prompts))
    row: dict[str, Any] = {
        "method": method,
        "drafts": "never accepted" if spoiled else "as they are",
        "batch": batch,
        "workload": workload,
        "to_plain": interval([p / a for p, a in zip(seconds[PLAIN], seconds[AUTO], strict=True)], args.engines),
        "to_bare": interval([b / a for b, a in zip(seconds[BARE], seconds[AUTO], strict=True)], args.engines),
        "auto_tokens_per_second": round(tokens / statistics.median(seconds[AUTO]), 1),
        "tau": round(counts.mean_acceptance_length or 1.0, 3),
        "drafted_a_step": round(counts.num_draft_tokens / max(1, counts.num_steps), 3),
    }
    if lengths:
        best = min((str(length) for length in lengths), key=lambda name: statistics.mean(seconds[name]))
        row["best_length"] = int(best)
        row["to_best"] = interval(against_best(seconds, [str(length) for length in lengths]))
        row["fixed"] = {
            str(length): interval([p / f for p, f in zip(seconds[PLAIN], seconds[str(length)], strict=True)])
            for length in lengths
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--draft", default="tiny", help="what draft_model and eagle3 draft with for another target")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--only", choices=["adversarial", "good"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8])
    parser.add_argument("--token", type=int, default=0, help="what a spoiled draft consists of")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96, help="of a request, on average")
    parser.add_argument("--spread", type=float, default=0.5, help="by which share requests ask for more or fewer")
    parser.add_argument("--repeats", type=int, default=7, help="with each pair of engines")
    parser.add_argument("--engines", type=int, default=1, help="pairs of engines, one after the other")
    parser.add_argument("--queue", type=int, default=6, help="prompts for every row, at least")
    parser.add_argument("--memory", default="4GiB", help="of each engine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(args.target))
    rows = []
    for workload in args.workloads:
        for batch in args.batches:
            prompts = WORKLOADS[workload](tokenizer, max(args.prompts, args.queue * batch))
            for method in args.methods:
                for spoiled in (True, False):
                    if args.only and spoiled != (args.only == "adversarial"):
                        continue
                    rows.append(measure(args, method, batch, workload, prompts, spoiled=spoiled))
                    print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    about = {
        "target": args.target,
        "dtype": args.dtype,
        "temperature": args.temperature,
        "prompts": f"at least {args.prompts} of each workload and {args.queue} for every row, {args.tokens} tokens on average",
        "spread": args.spread,
        "repeats": args.repeats,
        "engines": args.engines,
        "threads": args.threads,
        "versions": f"specplug {__version__}, torch {torch.__version__}, {platform.machine()}",
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
