"""Tiny models that join a text model with others, and what Transformers generates with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from support.models import ARCHITECTURES, SIZES, WINDOW
from support.recurrent import RECURRENT

_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            **SIZES,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
        "vision_config": _TOWER,
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **SIZES},
        "vision_config": {"model_type": "pixtral", **_TOWER},
        "spatial_merge_size": 2,
    },
    "qwen3_vl": {
        "text_config": {**SIZES, "rope_parameters": _ROPE},
        "vision_config": {
            "hidden_size": 32,
            "depth": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "out_hidden_size": 32,
        },
    },
    "qwen3_5": {
        "text_config": {**SIZES, "num_hidden_layers": 4, **RECURRENT["qwen3_5_text"], "rope_parameters": _ROPE},
        "vision_config": {
            "hidden_size": 32,
            "depth": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "out_hidden_size": 32,
        },
    },
    "llama4": {
        "text_config": {
            **SIZES,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
            "attention_chunk_size": 128,
        },
        "vision_config": {**_TOWER, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "kimi_k25": {
        "text_config": {"model_type": "deepseek_v3", **SIZES, **ARCHITECTURES["deepseek_v3"]},
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
        "projection_hidden_size": 32,
        "tie_word_embeddings": False,
    },
    "voxtral": {
        "text_config": {"model_type": "llama", **SIZES},
        "audio_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    },
}


def save_wrapper(folder: Path, kind: str) -> Path:
    """Writes a random float32 model of a kind in `WRAPPERS`; returns its folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **WRAPPERS[kind])
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:
                parameter.normal_(0, 0.4)
    model.save_pretrained(folder)
    return folder
