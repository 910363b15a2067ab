"""Writes a draft head in the speculators format, which vLLM, the speculators package and this plugin load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from specplug import ConfigurationError
from specplug_eagle.checkpoint.vocabulary import membership, offsets
from specplug_eagle.head.model import DraftHead
from specplug_eagle.head.spec import HeadSpec

_FORMAT_VERSION = "0.9.0"


def write_speculators_checkpoint(
    folder: str | Path,
    head: DraftHead,
    *,
    verifier: str | None,
    boundaries: Sequence[int] | None = None,
    verifier_architectures: Sequence[str] = (),
    speculative_tokens: int = 3,
    embedding: torch.Tensor | None = None,
) -> Path:
    """Writes `config.json` and `model.safetensors`; files of these names are replaced only once the new ones are complete.

    Args:
        folder: where to; made if it is missing.
        head: an EAGLE-3 head.
        verifier: the target's name, for information; no reader needs it to draft.
        boundaries: the target states the head was trained on; those of its spec if not given.
        verifier_architectures: the target's classes, for information.
        speculative_tokens: how many tokens a reader should draft unless told otherwise.
        embedding: the target's table [vocabulary, hidden], to store a copy in the file of a head that borrows it: the
            speculators package cannot borrow, vLLM and this plugin can.

    Returns:
        The folder.

    Raises:
        ConfigurationError: the format cannot express this head.
    """
    spec, folder = head.spec, Path(folder)
    _check(spec)
    tensors = {name: value for name, value in head.state_dict().items() if name in spec.tensor_shapes()}
    if embedding is not None and not spec.has_own_embedding:
        if tuple(embedding.shape) != (spec.vocab_size, spec.hidden_size):
            raise ConfigurationError(
                f"the embedding to store has the shape {list(embedding.shape)}, but the head needs "
                f"{[spec.vocab_size, spec.hidden_size]}"
            )
        tensors["embed_tokens.weight"] = embedding
    if head.draft_to_target is not None:
        tensors["d2t"] = offsets(head.draft_to_target)
        tensors["t2d"] = membership(head.draft_to_target, spec.vocab_size)
    ids = spec.layer_ids if boundaries is None else tuple(boundaries)
    if ids is not None and len(ids) != spec.num_aux_states:
        raise ConfigurationError(f"{len(ids)} boundaries were given for a head that reads {spec.num_aux_states} states")
    dtype = str(next(iter(head.parameters())).dtype).removeprefix("torch.")
    config = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": _FORMAT_VERSION,
        "draft_vocab_size": spec.draft_vocab_size,
        "dtype": dtype,
        "eagle_aux_hidden_state_layer_ids": None if ids is None else list(ids),
        "embed_requires_grad": False,
        "fc_norm": spec.fc_norm,
        "norm_before_fc": spec.norm_before_fc,
        "norm_before_residual": spec.norm_before_residual,
        "norm_output": spec.norm_output,
        "target_hidden_size": None if spec.target_hidden_size == spec.hidden_size else spec.target_hidden_size,
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": speculative_tokens,
                    "accept_tolerance": 0.0,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"name_or_path": verifier, "architectures": list(verifier_architectures)},
        },
        "transformer_layer_config": _layer_config(spec),
    }
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors.part", metadata={"format": "pt"})
    (folder / "config.json.part").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in ("model.safetensors", "config.json"):
        (folder / f"{name}.part").replace(folder / name)
    return folder


def _layer_config(spec: HeadSpec) -> dict[str, Any]:
    rope = {"rope_type": spec.rope.rope_type, "rope_theta": spec.rope.theta, **spec.rope.parameters}
    config: dict[str, Any] = {
        "model_type": "qwen3" if spec.qk_norm else "llama",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": spec.hidden_act,
        "rms_norm_eps": spec.rms_norm_eps,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.rope.max_position_embeddings,
        "rope_parameters": rope,
        "rope_theta": spec.rope.theta,
        "attention_bias": spec.qkv_bias,
        "tie_word_embeddings": False,
    }
    if not spec.qk_norm:
        config["mlp_bias"] = spec.mlp_bias
    if any(spec.windows):
        config["layer_types"] = ["sliding_attention" if window else "full_attention" for window in spec.windows]
        config["sliding_window"] = max(window or 0 for window in spec.windows)
        config["use_sliding_window"] = True
    return config


def _check(spec: HeadSpec) -> None:
    reasons = {
        "EAGLE-1 heads": spec.family != "eagle3",
        "heads without fc": spec.single_state,
        "a bias of fc": spec.fc_bias,
        "partial rotary embedding": spec.rope.partial_rotary_factor != 1.0,
        "biases of q, k and v alone": spec.qkv_bias != spec.o_bias,
        "an MLP with biases beside q and k norms": spec.mlp_bias and spec.qk_norm,
        "layers with different windows": len({window for window in spec.windows if window}) > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigurationError(f"the speculators format has no {reason}; this head cannot be written in it")
