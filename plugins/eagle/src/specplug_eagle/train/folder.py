"""Opens a finished head from a folder, outside an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from specplug import CheckpointError
from specplug_eagle.checkpoint import EagleCheckpoint, validate
from specplug_eagle.head import DraftHead
from specplug_eagle.train.target import Target


class HeadFolder:
    """Configuration and tensors of a checkpoint on disk; a `CheckpointHandle`.

    Args:
        source: a folder, or a hub name.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """

    def __init__(self, source: str) -> None:
        self.folder = _folder_of(source)
        try:
            self._config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder} has no readable config.json: {error}") from error
        if not isinstance(self._config, dict):
            raise CheckpointError(f"{self.folder / 'config.json'} is not a JSON object")
        self.tensors = _read(self.folder)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in self.tensors.items()}
        self.dtypes: Mapping[str, torch.dtype] = {name: tensor.dtype for name, tensor in self.tensors.items()}

    @property
    def config(self) -> Mapping[str, Any]:
        """The JSON of config.json."""
        return self._config

    def head(self, target: Target, **overrides: Any) -> DraftHead:
        """Makes the head, in the target's dtype and on its device.

        Args:
            target: gives the layers that the head has not.
            **overrides: of `EagleCheckpoint.open`.

        Raises:
            CheckpointError: not an EAGLE head, or a damaged one.
            ConfigurationError: a head for another target.
        """
        checkpoint = EagleCheckpoint.open(self, **overrides)
        validate(checkpoint.spec, target)
        moved = {}
        for name in checkpoint.names.values():
            tensor = self.tensors[name].to(target.device)
            moved[name] = tensor.to(target.dtype) if tensor.is_floating_point() else tensor
        return checkpoint.build(moved, embed=target.embed, logits=target.logits)[0]


def _folder_of(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise CheckpointError(f"'{source}' is not a folder with a draft head, nor a hub name like org/head")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except Exception as error:
        summary = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"the draft head '{source}' could not be had from the hub: {summary}") from error


def _read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    pickles = [] if files else sorted(folder.glob("pytorch_model*.bin"))
    if not files and not pickles:
        raise CheckpointError(f"{folder} holds neither safetensors nor pytorch_model.bin")
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for file in pickles:
            tensors |= torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, TypeError) as error:
        raise CheckpointError(f"the weights in {folder} are damaged: {' '.join(str(error).split())[:200]}") from error
    return tensors
