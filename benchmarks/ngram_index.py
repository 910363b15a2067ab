"""What `specplug-ngram` costs: microseconds per row and step, by tokens of context.

    python benchmarks/ngram_index.py [--json]

The text is the source of Python's standard library, split into words and signs. Every step appends 1 to 6 tokens to
each row, in turn, and asks the speculator for drafts. The first call of a row indexes its prompt, and is timed apart.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sysconfig
import time
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specplug import Budget, ProposalBatch, ProposalRow, SamplingParams, SpeculativeConfig, TokenView
from specplug_ngram import NgramSpeculator, load_speculator

if TYPE_CHECKING:
    from collections.abc import Iterator

DRAFT_TOKENS = 5


def library_tokens() -> Iterator[int]:
    """Ids of the words and signs of the standard library's files, in order of their names."""
    ids: dict[str, int] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for word in re.findall(r"\w+|\s+|[^\w\s]", path.read_text(encoding="utf-8", errors="replace")):
            yield ids.setdefault(word, len(ids))


def make_row(row_id: int, tokens: list[int], is_new: bool) -> ProposalRow:
    return ProposalRow(
        row_id=row_id,
        is_new=is_new,
        tokens=TokenView(tokens),
        new_positions=range(0),
        new_states=slice(0, 0),
        budget=Budget(DRAFT_TOKENS, DRAFT_TOKENS),
        sampling=SamplingParams(),
        outcome=None,
        table=None,  # type: ignore[arg-type]
        forked_from=None,
        generator=torch.Generator,
    )


def measure(speculator: NgramSpeculator, context: int, rows: int, steps: int) -> dict[str, Any]:
    """Times `propose` on rows of a context length."""
    source = library_tokens()
    texts = [list(islice(source, context + 4 * steps)) for _ in range(rows)]
    sequences = [text[:context] for text in texts]
    started = time.perf_counter()
    speculator.propose(ProposalBatch(rows=[make_row(row_id, sequences[row_id], True) for row_id in range(rows)]))
    first = time.perf_counter() - started
    times = []
    for _, new in zip(range(steps), cycle(range(1, 7)), strict=False):
        for text, sequence in zip(texts, sequences, strict=True):
            sequence += text[len(sequence) : len(sequence) + new]
        batch = ProposalBatch(rows=[make_row(row_id, sequences[row_id], False) for row_id in range(rows)])
        started = time.perf_counter()
        speculator.propose(batch)
        times.append((time.perf_counter() - started) / rows)
    speculator.propose(ProposalBatch(rows=[], ended=[(row_id, "finished") for row_id in range(rows)]))
    return {
        "context": context,
        "median_us": round(1e6 * statistics.median(times), 1),
        "p99_us": round(1e6 * statistics.quantiles(times, n=100)[98], 1),
        "first_call_ms": round(1e3 * first / rows, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 32768], help="tokens of context")
    parser.add_argument("--prompt-lookup-max", type=int, default=None)
    parser.add_argument("--prompt-lookup-min", type=int, default=None)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    options = {"prompt_lookup_max": args.prompt_lookup_max, "prompt_lookup_min": args.prompt_lookup_min}
    speculator = load_speculator(SpeculativeConfig("ngram", DRAFT_TOKENS, options), None)  # type: ignore[arg-type]
    results = [measure(speculator, context, args.rows, args.steps) for context in args.context]
    lengths = [speculator.shortest, speculator.longest]
    if args.json:
        print(json.dumps({"lengths": lengths, "rows": args.rows, "steps": args.steps, "results": results}, indent=2))
        return
    print(f"n-grams of {lengths[0]} to {lengths[1]} tokens, {args.rows} rows, {args.steps} steps of 1 to 6 new tokens")
    print(f"{'context':>8} {'µs/row and step':>16} {'p99':>8} {'first call, ms/row':>19}")
    for result in results:
        print("{context:8d} {median_us:16.1f} {p99_us:8.1f} {first_call_ms:19.1f}".format(**result))


if __name__ == "__main__":
    main()
