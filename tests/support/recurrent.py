"""Tiny random models of hybrid and recurrent kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from support.models import SIZES

_ONE_ATTENDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
_DELTA = {
    "layer_types": _ONE_ATTENDS,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 12, "mamba_n_groups": 2, "mamba_chunk_size": 8}
RECURRENT: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "num_dense_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "qwen3_next": {**_DELTA, **_EXPERTS},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_EXPERTS},
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4},
    "kimi_linear": {
        "layer_types": _ONE_ATTENDS,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": _ONE_ATTENDS,
        "shared_intermediate_size": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 12,
        "n_groups": 2,
        "chunk_size": 8,
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "time_step_min": 1e-6,  # `generate` raises step sizes to it in prompts alone
    },
    "mamba2": {"head_dim": 16, "num_heads": 4, "n_groups": 2, "state_size": 12, "chunk_size": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 6,
        "mamba_dt_rank": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mamba": {"state_size": 6, "time_step_rank": 4},
}


def save_recurrent(folder: Path, kind: str, seed: int = 0, layers: int = 4) -> Path:
    """Saves one; its weights are large enough for every layer to matter. The second layer attends, if one does."""
    settings = {**SIZES, "num_hidden_layers": layers, **RECURRENT[kind]}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][:layers]
    config = CONFIG_MAPPING[kind](**settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:
                parameter.normal_(0, 0.4)
    model.save_pretrained(folder)
    return folder
