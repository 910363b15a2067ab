"""RoPE and sliding window of a draft head's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specplug import CheckpointError
from specplug_eagle.checkpoint.config import DraftConfig, check_number, check_size
from specplug_eagle.head.spec import RopeSpec

DEFAULT_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor",),
}
_TUNING = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


def read_rope(config: DraftConfig, head_dim: int, theta: float | None = None) -> RopeSpec:
    """Reads the rotary settings. The base is the head's own: 10000 by default, independent of the target's.

    Args:
        config: the draft's configuration.
        head_dim: width of a head.
        theta: the user's override of the base.

    Raises:
        CheckpointError: a scaling type that is not known, or one without its settings.
    """
    modern = _mapping(config.layer, "rope_parameters")
    legacy = _mapping(config.layer, "rope_scaling")
    # Transformers 5 writes the base into rope_parameters; older files have it beside rope_scaling.
    stated = (theta, config.layer.get("rope_theta"), modern.get("rope_theta"), legacy.get("rope_theta"), DEFAULT_THETA)
    base = check_number("rope_theta", next(value for value in stated if value is not None))
    kind_of = [str(block.get("rope_type") or block.get("type") or "default") for block in (modern, legacy)]
    scaling, kind = (modern, kind_of[0]) if kind_of[0] != "default" or not legacy else (legacy, kind_of[1])
    if kind == "mrope":  # for text, all its sections have the same positions
        kind = "default"
    if kind not in ("default", *_NEEDED):
        raise CheckpointError(
            f"config.json: the RoPE type '{kind}' is not supported for draft heads (default, {', '.join(_NEEDED)} are)"
        )
    parameters: dict[str, Any] = {}
    for name in _NEEDED.get(kind, ()):
        if scaling.get(name) is None:
            raise CheckpointError(f"config.json: RoPE of type '{kind}' lacks '{name}'")
        parameters[name] = check_number(name, scaling[name])
    if kind == "yarn":
        parameters |= {name: check_number(name, scaling[name]) for name in _TUNING if scaling.get(name)}
        if isinstance(scaling.get("truncate"), bool):
            parameters["truncate"] = scaling["truncate"]
    if kind in ("yarn", "llama3") and scaling.get(_ORIGINAL) is not None:
        parameters[_ORIGINAL] = check_size(_ORIGINAL, scaling[_ORIGINAL])
    partial = modern.get("partial_rotary_factor") or config.layer.get("partial_rotary_factor") or 1.0
    partial = check_number("partial_rotary_factor", partial)
    rotary_dim = int(head_dim * partial)
    if partial > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(
            f"config.json: partial_rotary_factor {partial} of a head of {head_dim} rotates {rotary_dim} elements; it must "
            "be an even number of at least 2, at most the head"
        )
    longest = check_size("max_position_embeddings", config.layer.get("max_position_embeddings") or 2048)
    return RopeSpec(base, kind, parameters, partial, longest)  # type: ignore[arg-type]


def read_windows(config: DraftConfig, num_layers: int) -> tuple[int | None, ...]:
    """Reads each layer's sliding window. `sliding_window` alone means nothing: layer types or a switch must ask for it.

    Raises:
        CheckpointError: a layer type that is neither full nor sliding attention, or a window without a size.
    """
    types = config.layer.get("layer_types")
    if types is None:
        slides = bool(config.layer.get("use_sliding_window"))
        first = config.layer.get("max_window_layers") or 0
        if slides and first:
            check_size("max_window_layers", first)
        types = ["sliding_attention" if slides and layer >= first else "full_attention" for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) < num_layers:
        raise CheckpointError(f"config.json: 'layer_types' is {types!r}; it should name {num_layers} draft layers")
    windows: list[int | None] = []
    for kind in types[:num_layers]:
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(f"config.json: draft layers of the type {kind!r} are not supported")
        if kind == "full_attention":
            windows.append(None)
        elif config.layer.get("sliding_window") is None:
            raise CheckpointError("config.json: a draft layer has sliding attention, but 'sliding_window' is missing")
        else:
            windows.append(check_size("sliding_window", config.layer["sliding_window"]))
    return tuple(windows)


def _mapping(layer: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = layer.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping) or any(isinstance(entry, Mapping) for entry in value.values()):
        raise CheckpointError(
            f"config.json: '{name}' is {value!r}; one object with settings for all layers is supported"
        )
    return value
