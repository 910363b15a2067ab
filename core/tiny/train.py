"""Train the embedded `tiny` target from scratch and write it as package data.

    python core/tiny/corpus.py --out build/tiny
    python core/tiny/train.py --data build/tiny --out core/src/specplug/tiny

A CUDA device needs minutes; two CPU cores need about ten hours for all steps (`--steps 300` gives a recognisable model in
under an hour).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"


def configuration() -> LlamaConfig:
    """Deep rather than wide, so that one target step costs much more than a step of a one-layer draft."""
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def windows(tokens: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Draws `rows` random windows of `length` + 1 consecutive tokens: int64 [rows, length + 1]."""
    starts = torch.randint(len(tokens) - length - 1, (rows, 1), generator=generator)
    return tokens[starts.to(tokens.device) + torch.arange(length + 1, device=tokens.device)].long()


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy of a batch of windows, in nats."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor, length: int) -> float:
    """Mean loss over the whole held-out split, in consecutive windows."""
    count = (len(tokens) - 1) // length
    rows = torch.stack([tokens[i * length : i * length + length + 1].long() for i in range(count)])
    return sum(loss_of(model, chunk).item() * len(chunk) for chunk in rows.split(16)) / count


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="shortens the schedule to fit")
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens a window")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    sampler = torch.Generator().manual_seed(1)
    splits = {
        name: torch.from_numpy(np.fromfile(args.data / f"{name}.bin", dtype=np.uint16).astype(np.int32)).to(device)
        for name in ("train", "held_out")
    }
    model = LlamaForCausalLM(configuration()).to(device)
    run = torch.compile(model) if args.compile else model
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )

    started, step, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        minutes = (time.monotonic() - started) / 60
        progress = max(step / args.steps, minutes / args.max_minutes)
        warmup = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warmup * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))
        loss = loss_of(run, windows(splits["train"], args.batch, args.length, sampler))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} minutes {minutes:.1f} progress {progress:.2f}", flush=True)

    model.to(torch.bfloat16).eval()
    args.out.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(args.out)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.data / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(args.out)
    record = {
        "corpus": json.loads((args.data / "corpus.json").read_text()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "tokens_seen": step * args.batch * args.length,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "final_training_loss": round(loss.item(), 4),
        "held_out_loss": round(held_out_loss(model, splits["held_out"], args.length), 4),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    prompt = AutoTokenizer.from_pretrained(args.out)(PROMPT, return_tensors="pt").to(device)
    sample = model.generate(**prompt, max_new_tokens=150, do_sample=False)
    print(tokenizer.decode(sample[0]))


if __name__ == "__main__":
    main()
