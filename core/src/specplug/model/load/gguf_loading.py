"""What Transformers needs to read a GGUF file, and the memory that its reading takes."""

from __future__ import annotations

import logging
import math
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from specplug.errors import CheckpointError, one_line
from specplug.model.architecture.max_length import rope_parameters
from specplug.model.load.gguf_header import GGUFHeader, is_gguf, read_gguf_header
from specplug.model.load.library_output import quiet_quantizer

_FLOAT32_EXPERTS = ("qwen2_moe", "qwen3_moe", "minimax_m2")
_ROPE = re.compile(r"(^|\.)rope_(freqs|factors)")
_TOKENS = "tokenizer.ggml.tokens"
_SHORT = 4096  # entries; arrays of a configuration have one per layer
logger = logging.getLogger("specplug")


def load_gguf_config(file: Path) -> Any:
    """Makes a configuration of a file's metadata.

    Raises:
        CheckpointError: the file cannot be read (see `read_gguf_header`), or Transformers does not know its architecture.
    """
    from transformers import AutoConfig

    header = read_gguf_header(file)
    try:
        with reading_gguf():
            return AutoConfig.from_pretrained(**source_options(file))
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be used: Transformers makes no configuration of its metadata (architecture "
            f"'{header.architecture}'; {one_line(error, 200)}); give the same model as safetensors"
        ) from error


def source_options(checkpoint: Path) -> dict[str, Any]:
    """The arguments of any `from_pretrained` that name a checkpoint."""
    if not is_gguf(checkpoint):
        return {"pretrained_model_name_or_path": checkpoint}
    # In full: Transformers looks for a bare name in the working directory first.
    return {"pretrained_model_name_or_path": checkpoint.parent, "gguf_file": str(checkpoint.absolute())}


def model_options(checkpoint: Path) -> dict[str, Any]:
    """The arguments of a model's `from_pretrained` that name a checkpoint, and have a GGUF file dequantised."""
    import transformers

    options = source_options(checkpoint)
    if is_gguf(checkpoint) and hasattr(transformers, "GgufConfig"):  # before, there was nothing else
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


@contextmanager
def reading_gguf() -> Iterator[None]:
    """Silences Transformers and gguf, and has the latter skip vocabularies.

    Of 151,000 tokens and as many merges gguf makes arrays of one entry each, in 7 s, every time that a file is opened.
    Transformers reads them by code of its own where it needs them.
    """
    import gguf

    whole = gguf.GGUFReader
    with quiet_quantizer():
        gguf.GGUFReader = _short_reader(gguf)
        try:
            yield
        finally:
            gguf.GGUFReader = whole


def has_tokenizer(file: Path) -> bool:
    """Whether a file describes a tokenizer."""
    return _TOKENS in read_gguf_header(file).metadata


def loading_bytes(shapes: Mapping[str, tuple[int, ...]], model_type: str, dtype: torch.dtype, weight_bytes: int) -> int:
    """Bytes by which the peak of Transformers' reading exceeds the weights; an upper bound.

    gguf dequantises a tensor in float32 by pieces of 16 rows and joins them; the heap keeps the room of the pieces.
    Transformers copies the result and converts the copy. Experts are joined in float32 and converted when all is read.

    Args:
        shapes: of the file's tensors, in their order.
        model_type: of the configuration.
        dtype: that the weights are converted to.
        weight_bytes: of the model.
    """
    held = peak = heap = experts = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        heap = max(heap, size)
        is_joined = model_type in _FLOAT32_EXPERTS and name.endswith("_exps.weight")
        own = size if is_joined else size // 4 * dtype.itemsize
        experts += size if is_joined else 0
        held += own
        peak = max(peak, held + heap + (size if dtype == torch.float32 else 2 * size))
    if dtype != torch.float32:
        peak = max(peak, weight_bytes + experts + heap)
    return max(0, peak - weight_bytes)


def warn_of_rope(file: Path, config: Any) -> None:
    """Warns where a file scales RoPE and its configuration does not: Transformers leaves that out for most architectures."""
    header = read_gguf_header(file)
    scaled = _rope_scaling(header)
    if scaled and all(each.get("rope_type", "default") == "default" for each in rope_parameters(config)):
        logger.warning(
            "%s scales RoPE ('%s'), which Transformers does not read from GGUF files: the text differs from the original "
            "model's; the same model as safetensors has it",
            file,
            scaled,
        )


def _rope_scaling(header: GGUFHeader) -> str:
    """The name of a tensor or value that scales RoPE; empty if there is none."""
    key = f"{header.architecture}.rope.scaling.type"
    if header.metadata.get(key, "none") != "none":
        return key
    return next((name for name in header.shapes if _ROPE.search(name)), "")


def _short_reader(gguf: Any) -> Any:
    """A reader that parses the first entry of a long array alone: the tokens are as many times that one, others just one."""

    class ShortReader(gguf.GGUFReader):
        def _get_field_parts(self, offset: int, kind: int) -> Any:
            import numpy

            kinds = gguf.GGUFValueType
            if kind != kinds.ARRAY:
                return super()._get_field_parts(offset, kind)
            entry, count = self._get(offset, numpy.uint32), self._get(offset + 4, numpy.uint64)
            if count[0] <= _SHORT or entry[0] == kinds.ARRAY:
                return super()._get_field_parts(offset, kind)
            start = offset + 12
            _, first, data, types = super()._get_field_parts(start, entry[0])
            end = start
            for _ in range(int(count[0]) if entry[0] == kinds.STRING else 0):
                end += 8 + struct.unpack_from("<Q", self.data, end)[0]
            if end == start:
                end += int(count[0]) * first[0].nbytes
            return end - offset, [entry, count, *first], [2 + data[0]] * int(count[0]), [kinds.ARRAY, *types]

        def _push_field(self, field: Any, skip_sum: bool = False) -> Any:
            if len(field.data) > _SHORT and field.name != _TOKENS:  # Transformers counts these alone
                field = field._replace(data=field.data[:1])
            return super()._push_field(field, skip_sum)

    return ShortReader
