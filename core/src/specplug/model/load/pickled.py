"""`pytorch_model.bin`: a zip of a pickle and tensors, from which only tensors are ever unpickled."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from specplug.errors import CheckpointError

INDEX = "pytorch_model.bin.index.json"
PATTERN = "pytorch_model*.bin"


def find(folder: Path) -> list[Path]:
    """Returns the one weight file of a checkpoint without an index, or none.

    Raises:
        CheckpointError: there are shards, but no index that names them.
    """
    single = folder / "pytorch_model.bin"
    if single.is_file():
        return [single]
    if shards := sorted(folder.glob("pytorch_model-*.bin")):
        raise CheckpointError(f"{folder} has '{shards[0].name}', but no {INDEX}; download the index as well")
    return []


def describe(file: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file without their data, on the device `meta`.

    Raises:
        CheckpointError: the file is truncated or damaged, or holds anything but tensors by name.
    """
    return _load(file, torch.device("meta"))


def read(file: Path, names: Sequence[str], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Reads some tensors to a device, one after the other, each into memory of its own.

    Raises:
        CheckpointError: see `describe`.
    """
    tensors = _load(file, torch.device("cpu"))
    for name in names:
        # The tensors map the file itself: without a copy they would change, or fault, with it.
        yield name, tensors[name].to(device, copy=True).contiguous()


def _load(file: Path, device: torch.device) -> dict[str, torch.Tensor]:
    # Files older than torch 1.6 are not a zip, and cannot be mapped.
    mapped = zipfile.is_zipfile(file)
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded: Any = torch.load(file, map_location=device, mmap=mapped or None, weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"{file} holds more than tensors, which is never unpickled, or is damaged; download it again, or ask its "
                "authors for a safetensors file"
            ) from error
        raise CheckpointError(f"{file} is truncated or damaged: {type(error).__name__}; download it again") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{file} holds a {type(loaded).__name__}, not tensors by name; save its state_dict instead"
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{file} holds more than tensors: '{name}' is a {type(tensor).__name__}; save its state_dict instead"
            )
        tensors[name] = tensor.detach()
    return tensors
