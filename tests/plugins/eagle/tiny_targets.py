"""Targets of a few thousand weights for the trainer and the calibration, as folders and in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from specplug_eagle.train.target import Target

transformers_logging.disable_progress_bar()
VOCABULARY = 48


def make_target(folder: Path | None = None, *, layers: int = 8, seed: int = 0, spread: float = 0.3) -> Target:
    """A random target; with a small spread of its weights, what follows depends mostly on the last token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=spread,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    if folder is not None:
        model.save_pretrained(folder)
    return Target(model, None, "random")


def write_lines(file: Path, lines: list[object]) -> Path:
    file.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8"
    )
    return file


def write_texts(file: Path, count: int = 12, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    lines: list[object] = []
    for index in range(count):
        length = 12 + index % 5
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        lines.append({"input_ids": ids, "loss_from": index % 3})
    return write_lines(file, lines)
