"""Distil the embedded tiny draft from the tiny target's own outputs, and write it as package data.

    python core/tiny/corpus.py --out build/tiny
    python plugins/draft_model/tiny/distill.py --data build/tiny --out plugins/draft_model/src/specplug_draft_model/tiny

The target continues random windows of its corpus at temperatures 0, 0.7 and 1; the draft learns the target's whole
distribution (Kullback-Leibler divergence) at every position of those texts and of the corpus itself. Ten minutes on a CUDA
device; `--max-minutes 60` gives a usable draft on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from specplug.tiny import resolve_model

PROMPT_TOKENS = 96
NEW_TOKENS = 160
TEMPERATURES = (0.0, 0.7, 1.0)


def configuration(hidden_size: int, layers: int, intermediate_size: int) -> LlamaConfig:
    """A Llama with the target's vocabulary and context, and heads of 32."""
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def windows(tokens: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Draws random windows of consecutive tokens: int64 [rows, length]."""
    starts = torch.randint(len(tokens) - length, (rows, 1), generator=generator)
    return tokens[starts.to(tokens.device) + torch.arange(length, device=tokens.device)].long()


@torch.inference_mode()
def continuations(
    target: torch.nn.Module, tokens: torch.Tensor, rows: int, minutes: float, generator: torch.Generator
) -> torch.Tensor:
    """The target's own texts: int32 [N, PROMPT_TOKENS + NEW_TOKENS], a third at each temperature."""
    started, texts = time.monotonic(), []
    while not texts or time.monotonic() - started < 60 * minutes or len(texts) % len(TEMPERATURES):
        temperature = TEMPERATURES[len(texts) % len(TEMPERATURES)]
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        prompts = windows(tokens, rows, PROMPT_TOKENS, generator)
        texts.append(
            target.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                pad_token_id=0,
                **sampling,
            ).int()
        )
    return torch.cat(texts)


def divergence(target: torch.nn.Module, draft: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean KL(target ‖ draft) over all positions of a batch, in nats."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        with torch.no_grad():
            wanted = target(input_ids=batch, use_cache=False).logits
        given = draft(input_ids=batch, use_cache=False).logits
    wanted, given = wanted.float().log_softmax(-1).flatten(0, 1), given.float().log_softmax(-1).flatten(0, 1)
    return torch.nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean")


@torch.inference_mode()
def acceptance(target: torch.nn.Module, draft: torch.nn.Module, texts: dict[float, torch.Tensor]) -> dict[str, float]:
    """Acceptance on held-out texts of the target: argmax agreement on greedy ones, Σ min(p, q) on sampled ones.

    `greedy_length_γ` is the mean acceptance length with γ greedy drafts: on the target's own greedy path the drafts that are
    accepted are exactly the run of agreements, so that it needs no roll-out.
    """
    report: dict[str, float] = {}
    for temperature, batch in texts.items():
        probs = [
            model(input_ids=batch, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1].float()
            for model in (target, draft)
        ]
        if temperature:
            p, q = (logits.div(temperature).softmax(-1) for logits in probs)
            report[f"overlap_at_{temperature}"] = torch.minimum(p, q).sum(-1).mean().item()
            report[f"argmax_match_at_{temperature}"] = p.gather(-1, q.argmax(-1, keepdim=True)).mean().item()
            continue
        agree = (probs[0].argmax(-1) == probs[1].argmax(-1)).float()
        report["greedy_agreement"] = agree.mean().item()
        for gamma in (1, 2, 3, 4, 5, 6, 8):
            spans = agree.unfold(1, gamma, 1).cumprod(-1).sum(-1)
            report[f"greedy_length_{gamma}"] = 1 + spans.mean().item()
    return {name: round(value, 4) for name, value in report.items()}


def train(
    target: torch.nn.Module,
    draft: torch.nn.Module,
    texts: torch.Tensor,
    corpus: torch.Tensor,
    args: argparse.Namespace,
    sampler: torch.Generator,
) -> tuple[int, float]:
    """Trains the draft; returns (steps, last divergence)."""
    optimizer = torch.optim.AdamW(
        draft.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=texts.is_cuda
    )
    started, step, progress, last = time.monotonic(), 0, 0.0, 0.0
    while progress < 1.0:
        progress = max(step / args.steps, (time.monotonic() - started) / (60 * args.max_minutes))
        for group in optimizer.param_groups:
            warmup = min(1.0, (step + 1) / 100)
            group["lr"] = args.learning_rate * warmup * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))
        own = texts[torch.randint(len(texts), (args.batch,), generator=sampler).to(texts.device)].long()
        long = windows(corpus, args.batch // 8, 1024, sampler)
        loss = (divergence(target, draft, own) + divergence(target, draft, long)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            last = loss.item()
            print(f"step {step} divergence {last:.3f} progress {progress:.2f}", flush=True)
    return step, last


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what core/tiny/corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--intermediate-size", type=int, default=448)
    parser.add_argument("--generate-minutes", type=float, default=1.2)
    parser.add_argument("--generate-rows", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--max-minutes", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=128, help="texts a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    sampler = torch.Generator().manual_seed(1)
    corpus, held_out = (
        torch.from_numpy(np.fromfile(args.data / f"{name}.bin", dtype=np.uint16).astype(np.int32)).to(device)
        for name in ("train", "held_out")
    )
    target = AutoModelForCausalLM.from_pretrained(resolve_model(args.target), dtype=torch.bfloat16).to(device).eval()
    texts = continuations(target, corpus, args.generate_rows, args.generate_minutes, sampler)
    kept_for_test = continuations(target, held_out, 128, 0.0, sampler).long().split(128)
    print(f"{texts.numel():,} tokens of the target's own", flush=True)

    draft = LlamaForCausalLM(configuration(args.hidden_size, args.layers, args.intermediate_size)).to(device)
    steps, last = train(target, draft, texts, corpus, args, sampler)
    draft.to(torch.bfloat16).eval()
    draft.config.dtype = torch.bfloat16
    draft.save_pretrained(args.out)
    record = {
        "target": args.target,
        "parameters": sum(parameter.numel() for parameter in draft.parameters()),
        "generated_tokens": len(texts) * NEW_TOKENS,
        "steps": steps,
        "divergence": round(last, 4),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "held_out": acceptance(target, draft, dict(zip(TEMPERATURES, kept_for_test, strict=True))),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
