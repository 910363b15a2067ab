"""Small EAGLE heads for the tiny random targets of `support.models`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from specplug_eagle.checkpoint import write_speculators_checkpoint
from specplug_eagle.head import DraftHead, HeadSpec
from support.models import VOCABULARY

HIDDEN = 32
BOUNDARIES = (0, 2, 3)


def save_eagle3(
    folder: Path, *, draft_vocab: int = VOCABULARY, boundaries: tuple[int, ...] = BOUNDARIES, seed: int = 0, **changes: Any
) -> Path:
    """Writes a random EAGLE-3 head in the speculators format; returns its folder."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "family": "eagle3",
        "hidden_size": HIDDEN,
        "target_hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "draft_vocab_size": draft_vocab,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "num_aux_states": len(boundaries),
        **changes,
    }
    ids = None
    if draft_vocab < VOCABULARY:
        ids = torch.randperm(VOCABULARY)[:draft_vocab].sort().values
    head = DraftHead(HeadSpec(**options), draft_to_target=ids)
    head.reset_parameters(0.3)
    return write_speculators_checkpoint(folder, head, verifier=None, boundaries=boundaries)


def save_eagle1(folder: Path, *, seed: int = 0, vocabulary: int = VOCABULARY) -> Path:
    """Writes a random EAGLE-1 head in the authors' layout; returns its folder."""
    torch.manual_seed(seed)
    spec = HeadSpec(
        family="eagle1",
        hidden_size=HIDDEN,
        target_hidden_size=HIDDEN,
        vocab_size=vocabulary,
        draft_vocab_size=vocabulary,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        num_aux_states=1,
        has_own_lm_head=False,
        fc_bias=True,
    )
    head = DraftHead(spec)
    head.reset_parameters(0.3)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
