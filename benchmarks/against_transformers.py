"""specplug against Transformers on the same weights, in one run.

    python benchmarks/against_transformers.py [--model FOLDER] [--dtype float32] [--repeats 7] [--json]

Every repetition runs all contestants one after the other, so that a slow moment of the machine hits all of them; what is
reported are medians over the repetitions and medians of the ratios within them. A *request* is a prompt of its own
length with an output of its own length. `generate` of a batch pads the prompts and runs until the longest output is done;
only the tokens that were asked for count. Prompt lookup exists for one row only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

from specplug import LLM, SamplingParams, __version__
from specplug.tiny import resolve_model

NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
EDIT = """# Before:
def read_lines(path, encoding, limit):
    lines = []
    with open(path, encoding=encoding) as stream:
        for number, line in enumerate(stream):
            if number >= limit:
                break
            lines.append(line.rstrip())
    return lines

# After renaming {old} to {new}:
"""
Request = tuple[list[int], int]


def workloads(tokenizer: Any) -> dict[str, list[Request]]:
    """The measured requests: (prompt ids, tokens to generate)."""
    edits = [
        tokenizer(EDIT.format(old=old, new=new))["input_ids"]
        for old, new in (("lines", "rows"), ("path", "file"), ("stream", "source"), ("limit", "most"))
    ]
    chooser = random.Random(0)
    text = tokenizer(Path(transformers.__file__).with_name("hf_argparser.py").read_text(encoding="utf-8"))["input_ids"]
    ragged = []
    for _ in range(16):
        length, start = chooser.randint(16, 400), chooser.randint(0, len(text) - 500)
        ragged.append((text[start : start + length], chooser.randint(16, 128)))
    return {
        "one row, code editing": [(edits[0], 96)],
        "one row, continuing code": [(text[:200], 96)],
        "16 ragged requests, 8 rows": ragged,
        "8 equal rows": [(text[:128], 64)] * 8,
    }


def run_generate(model: Any, requests: list[Request], **options: Any) -> None:
    """Static batches of eight, left-padded."""
    for start in range(0, len(requests), 8):
        batch = requests[start : start + 8]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row, _ in batch])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row, _ in batch])
        tokens = max(count for _, count in batch)
        model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


def run_specplug(llm: LLM, requests: list[Request]) -> None:
    """All requests at once; the engine batches them."""
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in requests]
    llm.generate([ids for ids, _ in requests], params, use_tqdm=False)


def measure(contestants: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every contestant in every repetition, interleaved, after one warm-up of each."""
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = resolve_model(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype).to(args.device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options = {
        "dtype": args.dtype,
        "device": args.device,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "memory": "2GiB",
    }
    results = []
    with LLM(folder, **options) as plain, LLM(folder, speculative_config=NGRAM, **options) as ngram:
        for workload, requests in workloads(tokenizer).items():
            contestants = {
                "transformers generate": lambda requests=requests: run_generate(model, requests),
                "specplug plain": lambda requests=requests: run_specplug(plain, requests),
                "specplug ngram": lambda requests=requests: run_specplug(ngram, requests),
            }
            if len(requests) == 1:
                contestants["transformers prompt lookup"] = lambda requests=requests: run_generate(
                    model, requests, prompt_lookup_num_tokens=5
                )
            seconds = measure(contestants, args.repeats)
            tokens = sum(count for _, count in requests)
            base = seconds["transformers generate"]
            for name, times in seconds.items():
                results.append(
                    {
                        "workload": workload,
                        "contestant": name,
                        "tokens_per_second": round(tokens / statistics.median(times), 1),
                        "ratio_to_generate": round(
                            statistics.median(b / t for b, t in zip(base, times, strict=True)), 2
                        ),
                    }
                )
    about = {
        "model": args.model,
        "dtype": args.dtype,
        "device": args.device,
        "repeats": args.repeats,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"specplug {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
    if args.json:
        print(json.dumps({"about": about, "results": results}, indent=2))
        return
    print(" · ".join(f"{key} {value}" for key, value in about.items()))
    for row in results:
        print(
            f"{row['workload']:<28} {row['contestant']:<28} {row['tokens_per_second']:>8.1f} tokens/s "
            f"{row['ratio_to_generate']:>6.2f} x"
        )


if __name__ == "__main__":
    main()
