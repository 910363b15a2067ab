"""Errors for a path that is not a Hugging Face checkpoint: each says what it is, and what to do instead."""

from __future__ import annotations

import json
from pathlib import Path

from specplug.errors import CheckpointError

ADAPTER = "adapter_config.json"
_UNUSABLE = "it is not a Hugging Face checkpoint"


def not_a_folder(path: Path) -> CheckpointError:
    """For a path that exists and is not a folder."""
    if path.suffix.lower() == ".gguf":
        return CheckpointError(
            f"{path} is a GGUF file, which holds a target or a draft model; safetensors are needed here"
        )
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
        return CheckpointError(f"{path} is one file of a checkpoint; give its folder")
    return CheckpointError(f"'{path}' is not a folder with a checkpoint; give a folder or a hub name like org/model")


def without_config(folder: Path) -> CheckpointError:
    """For a folder without config.json."""
    if (folder / ADAPTER).is_file():
        base = _base_model(folder)
        return CheckpointError(
            f"{folder} has no config.json: it is an adapter (LoRA){f' for {base}' if base else ''}, not a model; give its "
            f"base model, and the adapter as lora_modules={{'name': '{folder}'}} (--lora-modules name={folder})"
        )
    known = {
        "*.gguf": "it holds {count} GGUF files; give the path of one, such as '{name}'",
        "model_index.json": "it is a diffusion pipeline, not a language model",
        "params.json": "it is in the format of the model's authors; give the checkpoint in Hugging Face's format",
        "*/config.json": "its subfolder '{found}' has one; give that folder",
        "snapshots/*/config.json": "its subfolder '{found}' has one; give that folder",
    }
    for pattern, what in known.items():
        if found := sorted(folder.glob(pattern)):
            parent = found[0].parent.relative_to(folder)
            return CheckpointError(
                f"{folder} has no config.json: {what.format(found=parent, name=found[0].name, count=len(found))}"
            )
    return CheckpointError(f"{folder} has no config.json; {_UNUSABLE}")


def check_no_adapter(folder: Path) -> None:
    """Refuses a model's folder with an adapter in it, which Transformers would apply only where peft is installed.

    Raises:
        CheckpointError: there is an adapter.
    """
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} has an adapter ({ADAPTER}) next to its config.json, and would not be applied: move its files to a "
            f"folder of their own and give that as lora_modules, merge it with peft's merge_and_unload(), or remove {ADAPTER}"
        )


def _base_model(folder: Path) -> str:
    try:
        return str(json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError):
        return ""
