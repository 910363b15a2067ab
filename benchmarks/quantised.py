"""Quantised targets versus bfloat16: bytes held, planned and real, and tokens per second of plain decoding.

    python benchmarks/quantised.py                          # every format whose package is installed
    python benchmarks/quantised.py --kinds gptq awq --rounds 9

A random Llama of 27M parameters is written in every format (by `tests/support/quantised.py`). All engines are started once,
without compiling; every round measures each of them once, in turn, and ratios are of the same round.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from specplug import LLM, SamplingParams
from specplug.bench.report import describe_machine
from support.held import held_bytes
from support.quantised import KINDS, save_plain, save_quantised

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "head_dim": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "initializer_range": 0.02,
}


def engines(kinds: list[str], root: Path, opened: ExitStack) -> dict[str, LLM]:
    """An engine for every format that can be written here, bfloat16 and int8 on load among them."""
    options = {"device": "cpu", "skip_tokenizer_init": True, "compile": False, "memory": "1GiB", "max_model_len": 128}
    plain = save_plain(root / "plain", "", "bfloat16", **SIZES)
    made = {"bfloat16": LLM(plain, **options), "int8 on load": LLM(plain, quantization="int8", **options)}
    for kind in kinds:
        try:
            made[kind] = LLM(save_quantised(root / kind, kind, "bfloat16", **SIZES), **options)
        except pytest.skip.Exception as missing:
            print(f"{kind}: {missing}")
    for llm in made.values():
        opened.callback(llm.close)
    return made


def main() -> None:
    """Prints one row of a table per format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=[kind for kind in KINDS if kind != "mxfp4"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sampling = SamplingParams(temperature=0, max_tokens=given.tokens, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        made = engines(given.kinds, Path(folder), opened)
        found: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(given.rounds + 1):
            for name, llm in made.items():
                started = time.perf_counter()
                llm.generate([[7, 8, 9, 10]], sampling, use_tqdm=False)
                if turn:  # the first round warms up
                    found[name].append(given.tokens / (time.perf_counter() - started))
        print(describe_machine(torch.device("cpu")))
        print(f"transformers {version('transformers')}")
        print(
            "| | planned | held / planned | tokens/s | ratio to bfloat16 (lowest to highest round) |\n|---|---|---|---|---|"
        )
        for name, llm in made.items():
            ratios = sorted(each / base for each, base in zip(found[name], found["bfloat16"], strict=True))
            planned = llm.engine.plan.target_weights
            print(
                f"| {name} | {planned / 2**20:.1f} MiB | {held_bytes(llm.engine.runner.model) / planned:.3f} | "
                f"{statistics.median(found[name]):.1f} | {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
            )


if __name__ == "__main__":
    main()
