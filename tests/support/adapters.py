"""Random LoRA adapters in PEFT's format, and models with an adapter merged into their weights: what they must equal."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(
    folder: Path,
    model: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    seed: int = 0,
    modules: Sequence[str] = ALL_LINEARS,
    size: float = 0.3,
    prefix: str = "base_model.model.",
    transposed: bool = False,
    **config: Any,
) -> Path:
    """Writes an adapter for a model: random numbers for all layers of these names; returns its folder.

    Args:
        folder: where.
        model: the model's folder, with one safetensors file.
        rank: of all layers that `rank_pattern` does not name by their last part.
        alpha: of all layers.
        seed: of the numbers.
        modules: the last parts of the layers' names.
        size: standard deviation of both matrices.
        prefix: of the tensors' names.
        transposed: whether the model's weights are [in, out], as GPT-2's are.
        config: more keys of adapter_config.json.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] not in modules or weight.dim() != 2:
            continue
        outs, ins = weight.shape[::-1] if transposed else weight.shape
        own = config.get("rank_pattern", {}).get(layer.rpartition(".")[2], rank)
        for side, shape in (("A", (own, ins)), ("B", (outs, own))):
            tensors[f"{prefix}{layer}.lora_{side}.weight"] = size * torch.randn(shape, generator=generator)
    assert tensors
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.1,
        "target_modules": list(modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "fan_in_fan_out": transposed,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def merge_adapter(folder: Path, model: Path, adapter: Path) -> Path:
    """Writes a copy of a model with weights W + scale * B @ A; returns its folder."""
    shutil.copytree(model, folder)
    weights = load_file(model / "model.safetensors")
    is_transposed = _config_of(adapter)["fan_in_fan_out"]
    for layer, down, up in _scaled(adapter):
        weight, added = weights[f"{layer}.weight"], up @ down
        weights[f"{layer}.weight"] = (weight.double() + (added.t() if is_transposed else added)).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def add_adapter(model: torch.nn.Module, adapter: Path) -> None:
    """Makes the layers of a loaded model add scale * B @ A to what they give, in float32."""

    def adding(down: torch.Tensor, up: torch.Tensor) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + (args[0].float() @ down.t() @ up.t()).to(output.dtype)

        return hook

    for layer, down, up in _scaled(adapter):
        model.get_submodule(layer).register_forward_hook(adding(down.float(), up.float()))


def _config_of(adapter: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return config


def _scaled(adapter: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Of each layer: its name, A, and scale * B, in float64."""
    config, low_rank = _config_of(adapter), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in low_rank if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        down, up = low_rank[name].double(), low_rank[name.replace("lora_A", "lora_B")].double()
        rank, last = len(down), layer.rpartition(".")[2]
        alpha = config.get("alpha_pattern", {}).get(last, config["lora_alpha"])
        yield layer, down, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * up
