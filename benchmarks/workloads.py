"""Prompts for benchmarks: code that the embedded models were not trained on, edits of it, and random tokens.

As JSON lines for `specplug bench --prompts`:

    python benchmarks/workloads.py editing --prompts 12 > build/editing.jsonl
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from pathlib import Path
from typing import Any

import transformers

from specplug import resolve_model

_FILES = ("hf_argparser.py", "configuration_utils.py", "trainer_utils.py", "image_utils.py", "time_series_utils.py")


def _sources() -> list[str]:
    root = Path(transformers.__file__).parent
    return [(root / name).read_text(encoding="utf-8") for name in _FILES if (root / name).is_file()]


def continuations(tokenizer: Any, count: int, length: int = 128, seed: int = 0) -> list[list[int]]:
    """Windows of `length` tokens from the middle of source files."""
    chooser = random.Random(seed)
    texts = [tokenizer(text)["input_ids"] for text in _sources()]
    prompts = []
    for number in range(count):
        text = texts[number % len(texts)]
        start = chooser.randrange(len(text) - length)
        prompts.append(text[start : start + length])
    return prompts


def edits(tokenizer: Any, count: int, seed: int = 0) -> list[list[int]]:
    """Functions of 6 to 20 lines, each with the instruction to rename one of its names: long copies with small changes."""
    chooser = random.Random(seed)
    prompts = []
    for text in _sources():
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or not 6 <= node.end_lineno - node.lineno + 1 <= 20:
                continue
            body = "\n".join(line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno])
            names = sorted(
                {arg.arg for arg in node.args.args if len(re.findall(rf"\b{arg.arg}\b", body)) > 2} - {"self"}
            )
            if names:
                old = chooser.choice(names)
                prompts.append(tokenizer(f"# Before:\n{body}\n\n# After renaming {old} to {old}_new:\n")["input_ids"])
    chooser.shuffle(prompts)
    return [prompt for prompt in prompts if len(prompt) < 400][:count]


def random_tokens(tokenizer: Any, count: int, length: int = 128, seed: int = 0) -> list[list[int]]:
    """Ids without any order: nothing can be foreseen, so that only costs are seen."""
    chooser = random.Random(seed)
    ids = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    return [chooser.choices(ids, k=length) for _ in range(count)]


CODE = {"continuing": continuations, "editing": edits}
WORKLOADS = {**CODE, "random": random_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--target", default="tiny", help="whose tokenizer is used")
    parser.add_argument("--prompts", type=int, default=12)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(args.target))
    for ids in WORKLOADS[args.workload](tokenizer, args.prompts):
        print(json.dumps({"prompt_token_ids": ids}))


if __name__ == "__main__":
    main()
