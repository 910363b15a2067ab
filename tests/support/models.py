"""Tiny random models of the architectures that the engine must run exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

VOCABULARY = 64
WINDOW = 6

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BASE: dict[str, Any] = {**SIZES, "initializer_range": 0.4}
_EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8,
    },
    "phi3": {},
    "mixtral": {"num_local_experts": 4, **_EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, **_EXPERTS},
    "gpt_oss": {
        "num_local_experts": 4,
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **_EXPERTS,
    },
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 160},
    "olmo2": {},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
        "head_dim": None,
        **_EXPERTS,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}

REPRESENTATIVE = ("llama", "gemma3_text", "gpt_oss", "deepseek_v3")
"""Plain; windows and normed heads; experts and sinks; latent attention: for tests that need not run all."""
BRANCHING: dict[str, dict[str, Any]] = {
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4, "intermediate_size": 32, "num_experts_per_tok": 2},
    "longcat_flash": {
        "num_layers": 3,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_hidden_layers": None,
        "num_key_value_heads": 4,
    },
}
"""Their forwards branch on the values of tensors."""


def make_config(architecture: str, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    options = {**_BASE, **(ARCHITECTURES | BRANCHING).get(architecture, {}), **changes}
    if architecture == "gpt2":
        drop = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
        options = {key: value for key, value in options.items() if key not in drop | {"head_dim"}}
    options = {key: value for key, value in options.items() if value is not None}
    return AutoConfig.for_model(architecture, **options)


def save_model(folder: Path, architecture: str, seed: int = 0, **changes: Any) -> Path:
    """Writes a random float32 model; returns its folder."""
    torch.manual_seed(seed)
    config = make_config(architecture, **changes)
    experts = getattr(config, "experts_implementation", None)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():  # layers whose initialiser ignores initializer_range would otherwise leave flat logits
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:
                parameter.normal_(0, 0.4)
            elif "sinks" in name:
                parameter.normal_(0, 1.0)
    model.save_pretrained(folder)
    assert experts is None or isinstance(experts, str)
    return folder
