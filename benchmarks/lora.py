"""What LoRA adapters cost: tokens per second without them, with room for them, and with rows that use one or four.

    python benchmarks/lora.py --model build/33M --rows 1 16 --rounds 7

Every round measures each way once, in turn, and ratios are of the same round: what else the machine does cancels out. Adapters
have random weights, rank 16 by default, in all linear layers. Prefill is included; prompts share nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from specplug import LLM, SamplingParams
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine

PROMPT_TOKENS = 32


def save_adapters(model: str, folder: Path, count: int, rank: int) -> dict[str, Path]:
    """Writes adapters with random weights for all layers that can have one."""
    planned = plan_engine(EngineConfig.create(model, enable_lora=True, memory="2GiB"))
    planned.facade.close()
    assert planned.adapters is not None
    found = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in planned.adapters.targets:
            for side, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                name = f"base_model.model.{layer.name}.lora_{side}.weight"
                tensors[name] = 0.01 * torch.randn(shape, generator=generator)
        own = folder / f"adapter-{number}"
        own.mkdir()
        save_file(tensors, own / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
        (own / "adapter_config.json").write_text(json.dumps(config))
        found[own.name] = own
    return found


def tokens_per_second(llm: LLM, rows: int, new_tokens: int, names: list[str | None], seed: int) -> float:
    """Of one call with so many prompts, whose adapters are taken in turn."""
    chooser = random.Random(seed)
    prompts = [[chooser.randrange(3, llm.engine.vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(rows)]
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    wanted = [names[row % len(names)] for row in range(rows)]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=wanted if any(wanted) else None)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    options = parser.parse_args()
    choice: Any = {"auto": "auto", "on": True, "off": False}[options.compile]
    common: dict[str, Any] = {"memory": "2GiB", "compile": choice, "max_num_seqs": max(options.rows)}
    with tempfile.TemporaryDirectory() as folder:
        adapters = save_adapters(options.model, Path(folder), 4, options.rank)
        with LLM(options.model, **common) as off, LLM(options.model, lora_modules=adapters, **common) as on:
            names: list[str | None] = list(adapters)
            ways: dict[str, tuple[LLM, list[str | None]]] = {
                "no LoRA": (off, [None]),
                "room, no adapter used": (on, [None]),
                "one adapter": (on, names[:1]),
                "half the rows, one adapter": (on, [names[0], None]),
                "four adapters": (on, names),
            }
            compiled = [llm.engine.runner.compiled is not None for llm in (off, on)]
            adapted = on.engine.runner.compiled_adapted is not None
            print(f"{options.model}, rank {options.rank}; compiled: {all(compiled)}, with adapters: {adapted}")
            for rows in options.rows:
                kept = {name: way for name, way in ways.items() if rows >= len(way[1])}
                speeds: dict[str, list[float]] = {name: [] for name in kept}
                for turn in range(-1, options.rounds):
                    for name, (llm, wanted) in kept.items():
                        speed = tokens_per_second(llm, rows, options.new_tokens, wanted, turn)
                        if turn >= 0:
                            speeds[name].append(speed)
                for name, found in speeds.items():
                    ratios = sorted(each / base for each, base in zip(found, speeds["no LoRA"], strict=True))
                    print(
                        f"  {rows:>3} rows  {name:<28} {statistics.median(found):>8.0f} tokens/s   "
                        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
