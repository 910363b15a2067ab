"""`adapter_config.json` of PEFT: rank and scale of each layer, and a refusal of what is not plain LoRA."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from specplug.errors import CheckpointError
from specplug.values import is_integer, shown

CONFIG = "adapter_config.json"
# Keys that describe how an adapter was trained, or which layers it has; its tensors say that too.
_DESCRIPTIVE = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    ]
)
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_REASONS = {
    "use_dora": "DoRA scales each output by the norm of the whole weight",
    "modules_to_save": "whole modules that replace the target's are not loaded",
    "bias": "trained biases are not loaded",
    "lora_bias": "biases of the low-rank layers are not loaded",
    "target_parameters": "adapters of parameters that are not linear layers (experts) are not applied",
    "trainable_token_indices": "trained embeddings of tokens are not loaded",
    "layer_replication": "the target's layers are not replicated",
    "alora_invocation_tokens": "an activated LoRA changes within a sequence",
    "init_lora_weights": "this initialisation changes the target's own weights; save the adapter as a plain LoRA, with peft's "
    "path_initial_model_for_weight_conversion",
}


@attrs.frozen
class AdapterConfig:
    """What an adapter's configuration says about its numbers.

    Attributes:
        file: where it was read.
        rank: the rank of layers that `rank_pattern` does not name.
        alpha: the numerator of their scale.
        rank_pattern: patterns of layers' names → their rank.
        alpha_pattern: patterns of layers' names → their alpha.
        is_rslora: the scale is alpha / sqrt(rank) (arXiv:2312.03732) instead of alpha / rank (arXiv:2106.09685).
    """

    file: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_rslora: bool

    @property
    def most_rank(self) -> int:
        """The largest rank that any layer can have."""
        return max([self.rank, *self.rank_pattern.values()])

    def rank_of(self, layer: str) -> int:
        """The rank of a layer."""
        return int(_match(self.rank_pattern, layer, self.rank))

    def scale_of(self, layer: str) -> float:
        """What the low-rank product of a layer is multiplied with."""
        rank = self.rank_of(layer)
        return float(_match(self.alpha_pattern, layer, self.alpha)) / (math.sqrt(rank) if self.is_rslora else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads the configuration of an adapter.

    Raises:
        CheckpointError: it is missing, damaged, or says that the adapter is more than low-rank layers.
    """
    file = folder / CONFIG
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = " (it has a config.json: it is a model)" if (folder / "config.json").is_file() else ""
        raise CheckpointError(
            f"{folder} has no {CONFIG}, so it is not a LoRA adapter in PEFT's format{what}"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object")
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file}: peft_type={shown(raw.get('peft_type'))}: only adapters of the type LORA are applied"
        )
    _check_plain(file, raw)
    rank: Any = raw.get("r")
    alpha: Any = raw.get("lora_alpha", 8)
    ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not all(is_integer(each, 1) for each in (rank, *ranks.values())):
        raise CheckpointError(f"{file}: r={shown(rank)}, rank_pattern={shown(ranks)}: expected integers of at least 1")
    if not isinstance(alphas, dict) or not all(_is_finite(each) for each in (alpha, *alphas.values())):
        raise CheckpointError(f"{file}: lora_alpha={shown(alpha)}, alpha_pattern={shown(alphas)}: expected numbers")
    for pattern in (*ranks, *alphas):
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{file}: the pattern {shown(pattern)} is not a regular expression: {error}"
            ) from error
    return AdapterConfig(file, rank, alpha, ranks, alphas, bool(raw.get("use_rslora")))


def _check_plain(file: Path, raw: Mapping[str, Any]) -> None:
    """Refuses what changes a target by more than low-rank layers, and what is not known to be harmless."""
    for key, value in raw.items():
        if key in _DESCRIPTIVE or value in (None, False) or value in ([], {}):
            continue
        if (key == "bias" and value == "none") or (key == "init_lora_weights" and value in _PLAIN_INITS):
            continue
        reason = _REASONS.get(key, "this kind of LoRA is not known here")
        raise CheckpointError(f"{file}: {key}={shown(value)} is not supported: {reason}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _match(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a layer's name, as PEFT finds it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)
