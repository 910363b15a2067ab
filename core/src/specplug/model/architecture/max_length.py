"""The longest sequence of a model, from its configuration."""

from __future__ import annotations

from typing import Any

CHUNKED = "chunked_attention"
LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")
_UNBOUNDED = 1 << 20


def context_length(config: Any) -> int:
    """The longest sequence the model has positions for.

    As in vLLM, RoPE that is scaled from an original length reaches `factor` times that length: YaRN from the
    `original_max_position_embeddings` that it names, linear scaling from `max_position_embeddings`. A larger
    `max_position_embeddings` is used as it is, and so it is where RoPE settings differ by type of layer, since then some
    layers are scaled and others are not.

    RoPE whose frequencies depend on the length (`LENGTH_DEPENDENT_ROPE`) is bounded by the length up to which they do not:
    a longer row would need other frequencies than the rest of the batch, from its first token on. Attention in chunks is
    bounded by the first chunk, in which it is causal attention.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or _UNBOUNDED
    parameters = rope_parameters(config)
    if len(parameters) == 1:
        length = max(length, _scaled_length(parameters[0], length))
    for each in parameters:
        if each.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            length = min(length, _constant_length(each, text) or length)
    length = min(length, chunk_size(config) or length)
    return int(length)


def chunk_size(config: Any) -> int | None:
    """Tokens of a chunk, if there are layers that attend in chunks."""
    text = config.get_text_config()
    if CHUNKED not in (getattr(text, "layer_types", None) or ()):
        return None
    size: int | None = getattr(text, "attention_chunk_size", None)
    return size


def context_note(config: Any) -> str:
    """Why the context is shorter than the configuration says; empty if it is not."""
    if (chunk := chunk_size(config)) and chunk == context_length(config):
        return f"beyond {chunk:,} tokens its layers attend in chunks, a mask that paged attention does not have"
    for each in rope_parameters(config):
        rope_type = each.get("rope_type")
        if rope_type in LENGTH_DEPENDENT_ROPE:
            return (
                f"beyond {context_length(config):,} tokens its {rope_type} RoPE rotates the whole sequence by other "
                "frequencies, which a batch cannot have row by row"
            )
    return ""


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The RoPE settings: one mapping, or one per type of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [value for value in rope.values() if isinstance(value, dict)] or [rope]


def _scaled_length(rope: dict[str, Any], length: int) -> float:
    factor = rope.get("factor") or 1.0
    if rope.get("rope_type") == "yarn":
        return (rope.get("original_max_position_embeddings") or length) * factor
    return length * factor if rope.get("rope_type") == "linear" else length


def _constant_length(rope: dict[str, Any], text: Any) -> int | None:
    """Up to which length the frequencies are constant; dynamic RoPE changes them beyond `max_position_embeddings`."""
    if rope.get("rope_type") == "dynamic":
        return None
    own: int | None = rope.get("original_max_position_embeddings")
    return own or getattr(text, "original_max_position_embeddings", None)
