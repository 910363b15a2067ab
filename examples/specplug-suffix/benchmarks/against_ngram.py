"""Suffix decoding against prompt lookup on work that repeats itself: target steps, acceptance and wall-clock.

    python examples/specplug-suffix/benchmarks/against_ngram.py [--json FILE]

Requests come one after the other, as an agent's do. Every repetition runs all contestants on the same requests, one
request each in turn, in engines that are new to them. Two ratios of wall-clock: to ngram as it is without any key, and to
its best setting here, which is the one with the most tokens per second. Output is greedy, and checked to be the same for
all contestants.

Workloads:
    similar    prompts of a few templates with other names filled in
    retries    the same few requests, each sent again several times with a remark changed
    edits      a loop of edits of one file: each prompt holds the model's own last version of it
    varied     unrelated functions to rename a name in: nothing is shared between requests
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
import transformers

import specplug_suffix
from specplug import LLM, SamplingParams, resolve_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULTS = "ngram defaults"
NGRAM: dict[str, dict[str, Any]] = {DEFAULTS: {"method": "ngram"}} | {
    f"ngram {lookup[0]} to {lookup[1]}, {tokens}": {
        "method": "ngram",
        "num_speculative_tokens": tokens,
        "prompt_lookup_min": lookup[0],
        "prompt_lookup_max": lookup[1],
    }
    for lookup in ((1, 4), (2, 8), (5, 5))
    for tokens in (5, 12, "auto")
}
SUFFIX: dict[str, dict[str, Any]] = {"suffix defaults": {"method": "suffix"}} | {
    f"suffix factor {factor:g}, {tokens}": {
        "method": "suffix",
        "num_speculative_tokens": tokens,
        "suffix_decoding_max_spec_factor": factor,
    }
    for factor, tokens in ((1.0, 12), (2.0, 12), (4.0, 12), (1.0, 24), (4.0, 24))
}
NAMES = ["user", "order", "item", "account", "message", "server", "event", "record"]
TEMPLATES = [
    "class {Name}:\n    def __init__(self, {name}_id, name):\n        self.{name}_id = {name}_id\n        self.name = name\n\n"
    "    def get_name(self):\n",
    "import unittest\n\n\nclass Test{Name}(unittest.TestCase):\n    def test_{name}(self):\n        {name} = {Name}()\n"
    "        self.assertEqual(",
    "def load_{name}(path):\n    with open(path) as f:\n        data = json.load(f)\n    return {Name}(data)\n\n\n"
    "def save_{name}(path, {name}):\n",
]
FUNCTIONS = [
    "def read_lines(path):\n    result = []\n    with open(path) as f:\n        for line in f:\n"
    "            result.append(line.strip())\n    return result\n",
    "def count_words(text):\n    counts = {}\n    for word in text.split():\n"
    "        counts[word] = counts.get(word, 0) + 1\n    return counts\n",
    "def find_max(values):\n    best = None\n    for value in values:\n        if best is None or value > best:\n"
    "            best = value\n    return best\n",
    "def join_paths(first, second):\n    if first.endswith('/'):\n        first = first[:-1]\n"
    "    return first + '/' + second\n",
    "def clamp(value, low, high):\n    if value < low:\n        return low\n    if value > high:\n        return high\n"
    "    return value\n",
    "def remove_items(items, unwanted):\n    kept = []\n    for item in items:\n        if item not in unwanted:\n"
    "            kept.append(item)\n    return kept\n",
]
RENAMES = [
    ("path", "name"),
    ("text", "line"),
    ("values", "items"),
    ("first", "left"),
    ("value", "number"),
    ("items", "all"),
]


def similar() -> Iterator[str]:
    """Templates with other names."""
    for name in NAMES:
        for template in TEMPLATES:
            yield template.format(name=name, Name=name.capitalize())


def retries() -> Iterator[str]:
    """The same requests again."""
    for attempt in range(6):
        for template, name in zip(TEMPLATES, NAMES, strict=False):
            yield f"# attempt {attempt}\n" + template.format(name=name, Name=name.capitalize())


def edits() -> Iterator[str]:
    """Edits of a file; `{last}` stands for what the model answered last."""
    for old, new in (
        ("result", "lines"),
        ("line", "row"),
        ("path", "name"),
        ("lines", "out"),
        ("row", "x"),
        ("f", "file"),
    ) * 3:
        yield f"# Before:\n{{last}}\n\n# After renaming {old} to {new}:\n"


def varied() -> Iterator[str]:
    """Unrelated edits."""
    for function, (old, new) in zip(FUNCTIONS, RENAMES, strict=True):
        yield f"# Before:\n{function}\n\n# After renaming {old} to {new}:\n"


WORKLOADS: dict[str, Callable[[], Iterator[str]]] = {
    "similar": similar,
    "retries": retries,
    "edits": edits,
    "varied": varied,
}


@attrs.define
class Tally:
    """What a contestant needed in one repetition."""

    seconds: float = 0.0
    tokens: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0


def repetition(llms: dict[str, LLM], prompts: list[str], params: SamplingParams) -> dict[str, Tally]:
    """Sends all requests to every contestant, one in turn."""
    tallies = {name: Tally() for name in llms}
    last = FUNCTIONS[0]
    for number, template in enumerate(prompts):
        prompt = template.replace("{last}", last)
        texts, names = [], list(llms)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            llm, tally = llms[name], tallies[name]
            before = llm.engine.stats.num_steps
            started = time.perf_counter()
            completion = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
            tally.seconds += time.perf_counter() - started
            tally.tokens += len(completion.token_ids)
            tally.steps += llm.engine.stats.num_steps - before
            tally.accepted += sum(source is not None for source in completion.token_sources)
            tally.drafted += completion.metrics.num_draft_tokens
            texts.append(completion.token_ids)
        assert all(text == texts[0] for text in texts), f"outputs differ: {prompt!r}"
        answer = completion.text.split("\n\n\n")[0].split("\n#")[0].rstrip() + "\n"
        last = answer if answer.startswith("def ") else last
    return tallies


def summary(workload: str, repetitions: list[dict[str, Tally]]) -> list[dict[str, Any]]:
    """One line for each contestant, with the ratios of every repetition."""

    def ratios(name: str, base: str) -> list[float]:
        return sorted(round(tallies[base].seconds / tallies[name].seconds, 3) for tallies in repetitions)

    speed = {
        name: statistics.median(tallies[name].tokens / tallies[name].seconds for tallies in repetitions)
        for name in repetitions[0]
    }
    best = max((name for name in speed if name in NGRAM), key=lambda name: speed[name])
    rows = []
    for name, tally in repetitions[0].items():
        rows.append(
            {
                "workload": workload,
                "contestant": name,
                "tokens": tally.tokens,
                "steps": tally.steps,
                "tokens_per_step": round(tally.tokens / tally.steps, 3),
                "accepted_per_drafted": round(tally.accepted / max(1, tally.drafted), 3),
                "tokens_per_second": round(speed[name], 1),
                "to_default_ngram": ratios(name, DEFAULTS) if DEFAULTS in speed else [],
                "to_best_ngram": ratios(name, best),
                "best_ngram": name == best,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--contestants", nargs="+", choices=[*NGRAM, *SUFFIX], default=[*NGRAM, *SUFFIX])
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--requests", type=int, default=1000, help="the most of a workload")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.AutoTokenizer.from_pretrained(resolve_model(args.target))
    params = SamplingParams(temperature=0, max_tokens=args.tokens)
    configs = {name: config for name, config in {**NGRAM, **SUFFIX}.items() if name in args.contestants}
    options: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 1, "max_model_len": 1024, "memory": "1GiB"}
    rows = []
    for workload in args.workloads:
        prompts = list(WORKLOADS[workload]())[: args.requests]
        repetitions = []
        for _ in range(args.repeats):
            with ExitStack() as stack:
                llms = {
                    name: stack.enter_context(
                        LLM(args.target, plugins={"suffix": specplug_suffix}, speculative_config=config, **options)
                    )
                    for name, config in configs.items()
                }
                for llm in llms.values():
                    llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
                repetitions.append(repetition(llms, prompts, params))
        for row in summary(workload, repetitions):
            rows.append(row)
            mark = "*" if row["best_ngram"] else " "
            print(
                f"{workload:8} {row['contestant']:22}{mark} {row['tokens']:5} tokens {row['steps']:5} steps "
                f"{row['tokens_per_step']:6.3f} a step  {row['accepted_per_drafted']:.2f} of drafted accepted  "
                f"{row['tokens_per_second']:7.1f}/s  to defaults {row['to_default_ngram']}  to best {row['to_best_ngram']}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
