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
    (r"window(_size)?$|^local_attention$|^attention_chunk_size$|^chunk_size$", WINDOW),
]
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What the names do not say: fields whose value must fit others.
_MLA: dict[str, Any] = {"num_key_value_heads": 4}
_OWN: dict[str, dict[str, Any]] = {
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
    "mamba2": {"head_dim": 16},
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
