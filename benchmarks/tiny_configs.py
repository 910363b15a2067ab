"""Tiny configurations of every causal language model that Transformers knows, made by the names of their fields."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 64
WINDOW = 6
CONTEXT = 160
LAYERS = 4

# What an integer field becomes, by the first pattern that its name matches.
_SIZES: list[tuple[str, int]] = [
    (r"^vocab_size", VOCABULARY),
    (r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|depth)$", LAYERS),
    (r"(num_key_value_heads|num_kv_heads|num_global_key_value_heads)$", 2),
    (r"(attention_heads|n_heads?|num_heads)$", 4),
    (
        r"^(rotary_dim|qk_rope_head_dim|qk_nope_head_dim|v_head_dim|global_head_dim|head_dim|swa_head_dim|kv_channels)$",
        8,
    ),
    (r"(lora_rank|latent_size|_rank)$", 16),
    (r"^(n_group|topk_group|num_expert_group|n_groups)$", 1),
    (r"(experts_per_tok|top_k|experts_top_k|topk|moe_k)$", 2),
    (r"(experts|expert_num)$", 4),
    (
        r"^(hidden_size|d_model|n_embd|embed_dim|emb_dim|word_embed_proj_dim|dim|embedding_size|attention_hidden_size|lru_width)$",
        32,
    ),
    (r"(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim)$", 48),
    (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length)$", CONTEXT),
    (r"window(_size)?$|^local_attention$|^chunk_size$", WINDOW),
]
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What the names do not say: fields whose value must fit others.
_MLA: dict[str, Any] = {"num_key_value_heads": 4}
_MIXED: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]}
_DELTA: dict[str, Any] = {
    **_MIXED,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_KIMI_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_CONV: dict[str, Any] = {"layer_types": ["conv", "full_attention", "conv", "conv"]}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 12,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_MIXED, **_MLA, "n_group": 1, "topk_group": 1, "first_k_dense_replace": LAYERS},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {**_MAMBA, **_MIXED},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 6, "mamba_dt_rank": 4},
    "kimi_linear": {**_MIXED, **_MLA, "linear_head_dim": 8, "linear_num_heads": 4, **_KIMI_EXPERTS},
    "lfm2": _CONV,
    "lfm2_moe": {**_CONV, "num_dense_layers": 2},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 12,
        "n_groups": 2,
        "chunk_size": 8,
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "time_step_min": 1e-6,
    },
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4},
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _DELTA),
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
        "mamba_d_state": 12,
        "mamba_ngroups": 2,
        "chunk_size": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "kv_channels": 8,
        "time_step_min": 1e-6,
    },
    **dict.fromkeys(
        ("axk1", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu", "dots3_note", "dots3_note_text"), _MLA
    ),
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v2": {**_MLA, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "longcat_flash": {**_MLA, "zero_expert_num": 2},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A configuration with four layers of 32 dimensions; composite models get tiny parts.

    Args:
        model_type: a key of Transformers' causal LM mapping.
        changes: fields of the text model, after everything else.
    """
    from transformers import CONFIG_MAPPING

    return _make(CONFIG_MAPPING[model_type], {**_OWN.get(model_type, {}), **changes})


def _make(config_class: Any, changes: dict[str, Any]) -> Any:
    default = config_class()
    options = {name: _size(name) for name, value in _fields(default) if _is_count(value) and _size(name) is not None}
    options |= {name: value for name, value in _TOKENS.items() if hasattr(default, name)}
    parts = list(getattr(default, "sub_configs", None) or ())
    text = next((part for part in ("text_config", "decoder_config") if part in parts), None)
    for part in parts:
        own = getattr(default, part, None)
        if own is not None:
            options[part] = _make(type(own), changes if part == text else {}).to_dict()
    if text is None:
        if getattr(default, "is_decoder", None) is False and not getattr(default, "is_encoder_decoder", False):
            options["is_decoder"] = True  # an encoder by default, which sees what comes later
        options |= changes
    return config_class(**options)


def _fields(config: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(config).items() if not name.startswith("_")]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size(name: str) -> int | None:
    return next((size for pattern, size in _SIZES if re.search(pattern, name)), None)


def layer_patterns(model_type: str) -> dict[str, dict[str, Any]]:
    """The arrangements of full and sliding-window layers that a model type allows, as changes of its tiny configuration."""
    from transformers import CONFIG_MAPPING

    patterns: dict[str, dict[str, Any]] = {"default": {}}
    try:
        fields = vars(CONFIG_MAPPING[model_type]().get_text_config())
    except Exception:  # no default configuration, or several texts
        return patterns
    if "sliding_window" not in fields:
        return patterns
    window: dict[str, Any] = {"sliding_window": WINDOW}
    if "use_sliding_window" in fields:
        window["use_sliding_window"] = True
    kinds = set(fields.get("layer_types") or ())
    if kinds and kinds <= {"full_attention", "sliding_attention"}:
        patterns["all sliding"] = {**window, "layer_types": ["sliding_attention"] * LAYERS}
        patterns["mixed"] = {**window, "layer_types": ["full_attention", "sliding_attention"] * (LAYERS // 2)}
    elif not kinds:
        patterns["sliding"] = window
    if "max_window_layers" in fields:
        patterns["max_window_layers"] = {**window, "max_window_layers": LAYERS // 2}
    return patterns
