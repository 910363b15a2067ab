"""Reading a model's weights: safetensors only, every tensor accounted for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from specplug import native
from specplug.errors import CheckpointError, one_line
from specplug.model import attention
from specplug.model.architecture import disable_padding_checks
from specplug.model.checkpoint import read_headers
from specplug.model.leftovers import check_leftovers
from specplug.model.packing import pack_linears
from specplug.model.quiet import quiet_transformers
from specplug.native.gpu import cuda


def load_model(
    folder: Path, config: Any, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
) -> torch.nn.Module:
    """Loads a causal LM in evaluation mode, with its attention going through the paged KV cache.

    Raises:
        CheckpointError: weights are missing, truncated, of another shape, or not safetensors.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    cuda.load() if device.type == "cuda" else native.load()
    read_headers(folder)
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=copy.deepcopy(config),
                dtype=dtype,
                attn_implementation=attention.IMPLEMENTATION,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, with names and shapes
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise CheckpointError(f"the weights of {folder} cannot be loaded: {one_line(error, 300)}") from error
    mismatched = report.get("mismatched_keys") or ()
    if mismatched:
        name, stored, expected = min(mismatched)
        raise CheckpointError(
            f"{folder}: {len(mismatched)} weights have another shape than config.json says, first '{name}': "
            f"{list(stored)}, not {list(expected)}; config.json and weights belong to different models"
        )
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing, first '{missing[0]}'")
    check_leftovers(folder, report.get("unexpected_keys") or (), config, type(model).__name__)
    disable_padding_checks(model)
    model.to(device).eval().requires_grad_(False)
    pack_linears(model)
    return model
