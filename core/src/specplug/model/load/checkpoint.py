"""Checkpoints on disk or on the hub: configuration and headers first, tensors only when asked.

Models are read from safetensors, or from a GGUF file in place of a folder. A speculator's own weights may also be a
`pytorch_model.bin`, read by `pickled`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug.errors import CheckpointError, one_line
from specplug.model.load import pickled
from specplug.model.load.formats import check_no_adapter, not_a_folder, without_config
from specplug.model.load.gguf_header import find_gguf, is_gguf, read_gguf_header
from specplug.model.load.gguf_loading import load_gguf_config
from specplug.model.load.library_output import quiet_transformers

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
    """A tensor's file, shape and dtype, known without reading its values."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def resolve_checkpoint(
    source: str, revision: str | None = None, *, pickles: bool = False, trust_remote_code: bool = False
) -> Path:
    """Returns the local folder of a checkpoint, or its GGUF file: a path unchanged, a hub name through the hub's cache.

    Only configuration, tokenizer and safetensors files are fetched: code only with `trust_remote_code`, and no pickles unless
    `pickles` allows them and there is no safetensors file.

    Raises:
        CheckpointError: there is no such folder, and the hub has no such checkpoint or cannot be reached.
    """
    if not source:
        raise CheckpointError("the model's name is empty; give a folder, a hub name like org/model, or tiny")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return (None if pickles else find_gguf(folder)) or folder
    if is_gguf(folder) and not pickles:
        return folder
    if folder.exists():
        raise not_a_folder(folder)
    if folder.suffix.lower() == ".gguf":
        raise CheckpointError(f"there is no file '{source}'; a GGUF file must be on this machine: download it first")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise CheckpointError(
            f"'{source}' is not a folder with a checkpoint; give a folder or a hub name like org/model"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if trust_remote_code else [])]
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        if pickles and not any(folder.glob("*.safetensors")):
            patterns = ["*.json", pickled.PATTERN]
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        return folder
    except Exception as error:
        at = f" at revision '{revision}'" if revision else ""
        summary = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"'{source}' is not a local folder, and could not be downloaded from the hub{at}: {type(error).__name__}: {summary}"
        ) from error


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Reads a model's configuration.

    Raises:
        CheckpointError: config.json is missing, unreadable, or of a type this Transformers does not know; or there is an
            adapter next to it. For GGUF files see `load_gguf_config`.
    """
    import transformers

    if is_gguf(folder):
        return load_gguf_config(folder)
    file = folder / "config.json"
    raw = read_json_config(folder)
    check_no_adapter(folder)
    model_type = raw.get("model_type")
    if not trust_remote_code and model_type not in transformers.CONFIG_MAPPING:
        if "AutoConfig" in (raw.get("auto_map") or {}):
            what = "needs the code that comes with the checkpoint; if you trust it, set trust_remote_code=True"
        else:
            what = (
                f"is unknown to Transformers {transformers.__version__}; upgrade Transformers, or correct config.json"
            )
        raise CheckpointError(f"{file} cannot be used: model type '{model_type}' {what}")
    try:
        with quiet_transformers():
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be used: {one_line(error)}") from error


def read_json_config(folder: Path) -> dict[str, Any]:
    """Reads config.json as plain JSON, for checkpoints whose configuration is not a model's.

    Raises:
        CheckpointError: it is missing, or not a JSON object.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise without_config(folder) from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}; download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object; download it again")
    return config


def read_headers(folder: Path, *, pickles: bool = False) -> dict[str, TensorHeader]:
    """Reads the header of every file with weights and checks that none is truncated.

    Args:
        folder: the checkpoint; the tensors of a GGUF file are those that it gives when it is dequantised.
        pickles: whether to accept `pytorch_model.bin` where there is no safetensors file; only tensors are ever unpickled.

    Raises:
        CheckpointError: no weight file, a missing shard, a damaged header, a truncated file, or a pickle that holds
            anything but tensors.
    """
    headers: dict[str, TensorHeader] = {}
    if is_gguf(folder):
        return {
            name: TensorHeader(folder, shape, torch.float32) for name, shape in read_gguf_header(folder).shapes.items()
        }
    if pickles and not any(folder.glob("*.safetensors")) and not (folder / "model.safetensors.index.json").is_file():
        for file in _shards(folder, pickled.INDEX) or pickled.find(folder):
            for name, tensor in pickled.describe(file).items():
                headers[name] = TensorHeader(file, tuple(tensor.shape), tensor.dtype)
        if headers:
            return headers
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
    """Reads tensors to a device, floating ones converted to `dtype`. `progress` is called with (done, total) tensors.

    Raises:
        CheckpointError: a file changed or was damaged since its header was read.
    """
    tensors: dict[str, torch.Tensor] = {}
    by_file: dict[Path, list[str]] = {}
    for name, header in headers.items():
        by_file.setdefault(header.file, []).append(name)
    for file, names in by_file.items():
        for name, tensor in _read_tensors(file, names, device):
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


def _read_tensors(file: Path, names: list[str], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix == ".bin":
        yield from pickled.read(file, names, device)
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt", device=str(device)) as opened:
        for name in names:
            yield name, opened.get_tensor(name)


def _shards(folder: Path, name: str) -> list[Path]:
    """The files that an index names; none without an index."""
    index = folder / name
    if not index.is_file():
        return []
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index} is damaged: {type(error).__name__}: {error}") from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(shards)} weight files, first '{missing[0]}'")
    return [folder / shard for shard in shards]


def _weight_files(folder: Path) -> list[Path]:
    if shards := _shards(folder, "model.safetensors.index.json"):
        return shards
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(folder.glob("*.bin"))
        hint = f" ('{pickles[0].name}' is a pickle: convert it to safetensors)" if pickles else ""
        if several := sorted(folder.glob("*.gguf")):
            hint = f", and {len(several)} GGUF files; give the path of one, such as '{several[0].name}'"
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
