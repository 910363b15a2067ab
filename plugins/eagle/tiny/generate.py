"""Let the tiny target write the texts that its head is trained and measured on.

    python core/tiny/corpus.py --out build/tiny
    python plugins/eagle/tiny/generate.py --data build/tiny --out build/tiny-head

The target continues random windows of its corpus at temperatures 0, 0.7 and 1. Every third batch has long prompts, so that
the head also learns to look far back.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from specplug.tiny import resolve_model

PROMPT_TOKENS = 96
LONG_PROMPT_TOKENS = 864
NEW_TOKENS = 160
TEMPERATURES = (0.0, 0.7, 1.0)


def windows(tokens: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Draws random windows of consecutive tokens: int64 [rows, length]."""
    starts = torch.randint(len(tokens) - length, (rows, 1), generator=generator)
    return tokens[starts.to(tokens.device) + torch.arange(length, device=tokens.device)].long()


@torch.inference_mode()
def continuations(target: torch.nn.Module, prompts: torch.Tensor, temperature: float) -> torch.Tensor:
    """The target's own texts, prompts included: int64 [rows, prompt + NEW_TOKENS]."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    return target.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        **sampling,
    )


def write(file: Path, texts: list[torch.Tensor], loss_from: int) -> int:
    """Writes JSON lines; returns how many tokens."""
    with file.open("w", encoding="utf-8") as stream:
        for batch in texts:
            for row in batch.tolist():
                stream.write(json.dumps({"input_ids": row, "loss_from": loss_from}) + "\n")
    return sum(batch.numel() for batch in texts)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what core/tiny/corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the texts")
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--minutes", type=float, default=1.5)
    parser.add_argument("--rows", type=int, default=4096, help="texts of a batch; a quarter of it with long prompts")
    parser.add_argument("--held-out-rows", type=int, default=128, help="texts for each temperature")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    corpus, held_out = (
        torch.from_numpy(np.fromfile(args.data / f"{name}.bin", dtype=np.uint16).astype(np.int32)).to(device)
        for name in ("train", "held_out")
    )
    target = AutoModelForCausalLM.from_pretrained(resolve_model(args.target), dtype=dtype).to(device).eval()
    args.out.mkdir(parents=True, exist_ok=True)
    sampler = torch.Generator().manual_seed(2)
    for temperature in TEMPERATURES:
        prompts = windows(held_out, args.held_out_rows, PROMPT_TOKENS, sampler)
        write(args.out / f"held_out_{temperature}.jsonl", [continuations(target, prompts, temperature)], PROMPT_TOKENS)
    started, texts, kinds = time.monotonic(), [], 0
    sampler.manual_seed(1)
    while time.monotonic() - started < 60 * args.minutes or kinds % 9:
        long = kinds // 3 % 3 == 2
        rows, length = (args.rows // 4, LONG_PROMPT_TOKENS) if long else (args.rows, PROMPT_TOKENS)
        prompts = windows(corpus, max(rows, 1), length, sampler)
        texts.append(continuations(target, prompts, TEMPERATURES[kinds % 3]).cpu())
        kinds += 1
    tokens = write(args.out / "texts.jsonl", texts, 0)
    report = {"texts": sum(map(len, texts)), "tokens": tokens, "written_by_target": sum(map(len, texts)) * NEW_TOKENS}
    (args.out / "texts.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
