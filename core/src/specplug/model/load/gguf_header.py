"""The header of a GGUF file: its metadata and the shapes of its tensors, without their numbers.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from specplug.errors import CheckpointError

_PACKAGES = ("gguf", "accelerate")
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


@attrs.frozen
class GGUFHeader:
    """What a GGUF file says before its numbers.

    Attributes:
        file: the file.
        metadata: its values by name; None in place of an array.
        shapes: of its tensors by name, as PyTorch has them, in the order of the file.
    """

    file: Path
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """The name that llama.cpp has for the kind of model."""
        return str(self.metadata["general.architecture"])


def is_gguf(path: Path) -> bool:
    """Whether a checkpoint is a GGUF file; else it is a folder."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def find_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that has one and no safetensors; else None."""
    files = list(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 and not any(folder.glob("*.safetensors")) else None


def read_gguf_header(file: Path) -> GGUFHeader:
    """Reads a header, and checks that the file is whole.

    Raises:
        CheckpointError: it is not such a file, truncated, one of several parts, or holds tensors of an unknown type; or a
            package that reads such files is missing.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise CheckpointError(
            f"{file} is a GGUF file, which Transformers reads with {' and '.join(_PACKAGES)}; not installed here: "
            f"{', '.join(missing)}; pip install 'specplug[gguf]'"
        )
    with file.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise CheckpointError(f"{file} is not a GGUF file, or is damaged: it does not begin with GGUF")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(file, data)
            except (struct.error, OverflowError, UnicodeDecodeError) as error:
                raise CheckpointError(
                    f"{file} is truncated or damaged: its header ends early ({len(data):,} bytes); download it again"
                ) from error
            except (TypeError, RecursionError) as error:  # a number that is a text; arrays in arrays without end
                raise CheckpointError(f"{file} is damaged: its header makes no sense; download it again") from error


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data = data
        self.position = position

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self.position)
        self.position += struct.calcsize(form)
        return value

    def text(self) -> str:
        end = self.number("<Q") + self.position
        if end > len(self._data):
            raise OverflowError
        self.position, start = end, self.position
        return self._data[start:end].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise OverflowError
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SCALARS:
            self.position += count * struct.calcsize(_SCALARS[kind])
            return None
        for _ in range(count):
            if kind == _STRING:
                length = self.number("<Q")
                self.position += length
            else:
                self.value(kind)
        return None


def _read(file: Path, data: mmap.mmap) -> GGUFHeader:
    cursor = _Cursor(data, len(_MAGIC))
    version, num_tensors, num_values = cursor.number("<I"), cursor.number("<Q"), cursor.number("<Q")
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{file} is GGUF version {version}, or big-endian; versions 2 and 3 can be read: convert the model again"
        )
    metadata = {}
    for _ in range(num_values):
        name, kind = cursor.text(), cursor.number("<I")
        metadata[name] = cursor.value(kind)
    if not isinstance(metadata.get("general.architecture"), str):
        raise CheckpointError(f"{file} holds no model: its metadata has no general.architecture")
    _check_whole(file, metadata)
    shapes: dict[str, tuple[int, ...]] = {}
    end = 0
    for _ in range(num_tensors):
        name, depth = cursor.text(), cursor.number("<I")
        shapes[name] = tuple(cursor.number("<Q") for _ in range(depth))[::-1]
        kind, offset = cursor.number("<I"), cursor.number("<Q")
        end = max(end, offset + _stored_bytes(file, name, math.prod(shapes[name]), kind))
    alignment = metadata.get("general.alignment") or _ALIGNMENT
    expected = -(-cursor.position // alignment) * alignment + end
    if expected > len(data):
        raise CheckpointError(
            f"{file} is truncated: {len(data):,} bytes where its header says {expected:,}; download it again"
        )
    return GGUFHeader(file, metadata, shapes)


def _check_whole(file: Path, metadata: Mapping[str, Any]) -> None:
    if (count := metadata.get("split.count") or 1) > 1:
        raise CheckpointError(
            f"{file} is part {metadata.get('split.no', 0) + 1} of {count} of a model, and Transformers reads whole files; "
            "merge the parts: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf"
        )


def _stored_bytes(file: Path, name: str, elements: int, kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file}: tensor '{name}' is of type {kind}, which the package gguf does not know; upgrade it, or take a file with "
            "another quantisation"
        ) from error
    return -(-elements // block) * size
