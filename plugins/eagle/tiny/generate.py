"""Let the tiny target write the texts that its head is trained and measured on.

    python core/tiny/corpus.py --out build/tiny
    python plugins/eagle/tiny/generate.py --data build/tiny --out build/tiny-head --split train --temperature 0.7 --rows 8192

The target continues random windows of its corpus. Without a temperature the windows themselves are written, which are longer:
from them the head learns to look far back.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from specplug.tiny import resolve_model

PROMPT_TOKENS = 96
NEW_TOKENS = 160
WINDOW_TOKENS = 1024


def windows(tokens: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Draws random windows of consecutive tokens: int64 [rows, length]."""
    starts = torch.randint(len(tokens) - length, (rows, 1), generator=generator)
    return tokens[starts + torch.arange(length)].long()


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


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what core/tiny/corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the texts")
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--split", choices=("train", "held_out"), required=True)
    parser.add_argument(
        "--temperature", type=float, help="of the target's continuations; the corpus itself if not given"
    )
    parser.add_argument("--rows", type=int, required=True, help="how many texts")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = "corpus" if args.temperature is None else str(args.temperature)
    seed = sum(f"{args.split} {kind}".encode())
    torch.manual_seed(seed)
    sampler = torch.Generator().manual_seed(seed)
    corpus = torch.from_numpy(np.fromfile(args.data / f"{args.split}.bin", dtype=np.uint16).astype(np.int32))
    if args.temperature is None:
        texts, learned_from = windows(corpus, args.rows, WINDOW_TOKENS, sampler), 0
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        target = AutoModelForCausalLM.from_pretrained(resolve_model(args.target), dtype=dtype).to(device).eval()
        prompts = windows(corpus, args.rows, PROMPT_TOKENS, sampler).to(device)
        texts = continuations(target, prompts, args.temperature).cpu()
        learned_from = PROMPT_TOKENS if args.split == "held_out" else 0
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{args.split}_{kind}.jsonl").open("w", encoding="utf-8") as stream:
        for row in texts.tolist():
            stream.write(json.dumps({"input_ids": row, "loss_from": learned_from}) + "\n")


if __name__ == "__main__":
    main()
