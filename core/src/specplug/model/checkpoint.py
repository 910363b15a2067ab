"""Checkpoints on disk or on the hub: configuration and safetensors headers first, tensors only when asked."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug.errors import CheckpointError

_MAX_HEADER = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@attrs.frozen
class TensorHeader:
    """Where a tensor lies and what it is, from a safetensors header."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def resolve_checkpoint(source: str, revision: str | None = None) -> Path:
    """Returns the local folder of a checkpoint: a path as it is, a hub name through the hub's cache.

    Only configuration, tokenizer and safetensors files are ever fetched: no code, no pickles.

    Raises:
        CheckpointError: there is no such folder, and the hub has no such checkpoint or cannot be reached.
    """
    if not source:
        raise CheckpointError("the model's name is empty; give a folder, a hub name like org/model, or tiny")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise CheckpointError(
            f"'{source}' is not a folder with a checkpoint; give a folder or a hub name like org/model"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:
        at = f" at revision '{revision}'" if revision else ""
        summary = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"'{source}' is no local folder, and could not be had from the hub{at}: {type(error).__name__}: {summary}"
        ) from error


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Reads a model's configuration.

    Raises:
        CheckpointError: config.json is missing, unreadable, or of a type this Transformers does not know.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; it is not a Hugging Face checkpoint")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {type(error).__name__}: {error}") from error


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Reads the header of every safetensors file of a checkpoint and checks that no file is cut short.

    Raises:
        CheckpointError: no safetensors file, a missing shard, a damaged header, or a truncated file.
    """
    headers: dict[str, TensorHeader] = {}
    for file in _weight_files(folder):
        for name, entry in _read_header(file).items():
            if name == "__metadata__":
                continue
            if entry.get("dtype") not in _DTYPES:
                raise CheckpointError(
                    f"{file}: tensor '{name}' has the dtype {entry.get('dtype')}, which is not supported"
                )
            headers[name] = TensorHeader(file, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
    return headers


def load_tensors(
    headers: Mapping[str, TensorHeader],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Reads tensors to a device, floating ones converted to `dtype`. `progress` is called with (done, total) tensors."""
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    by_file: dict[Path, list[str]] = {}
    for name, header in headers.items():
        by_file.setdefault(header.file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt", device=str(device)) as opened:
            for name in names:
                tensor = opened.get_tensor(name)
                tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
                if progress is not None:
                    progress(len(tensors), len(headers))
    return tensors


def choose_dtype(name: str | torch.dtype, config: Any) -> torch.dtype:
    """Resolves `auto` (the checkpoint's own dtype, float32 if it names none) or a dtype's name.

    Raises:
        CheckpointError: the name is not a floating dtype that models run in.
    """
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        own = getattr(config.get_text_config(), "dtype", None)
        return own if isinstance(own, torch.dtype) else DTYPE_NAMES.get(str(own), torch.float32)
    if name not in DTYPE_NAMES:
        raise CheckpointError(f"dtype '{name}' is not one of auto, {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{index} is damaged: {type(error).__name__}: {error}") from error
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} of {len(shards)} weight files, first '{missing[0]}'")
        return [folder / name for name in shards]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(folder.glob("*.bin"))
        hint = f" ('{pickles[0].name}' is a pickle: convert it to safetensors)" if pickles else ""
        raise CheckpointError(f"{folder} has no safetensors weights{hint}")
    return files


def _read_header(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(_MAX_HEADER, size):
            raise CheckpointError(f"{file} is damaged: its header does not fit the file; download it again")
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} is damaged: its header is not JSON; download it again") from error
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if ends and 8 + length + max(ends) != size:
        expected = 8 + length + max(ends)
        raise CheckpointError(
            f"{file} is truncated: {size:,} bytes where its header says {expected:,}; download it again"
        )
    return header
