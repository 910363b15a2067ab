"""Reading a model's weights: safetensors or a GGUF file, every tensor accounted for."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug import native
from specplug.errors import CheckpointError, one_line
from specplug.model.architecture.architecture import Architecture
from specplug.model.architecture.trace import disable_padding_checks
from specplug.model.attention.interface import IMPLEMENTATION, register
from specplug.model.load.checkpoint import TensorHeader, read_headers
from specplug.model.load.gguf_header import is_gguf
from specplug.model.load.gguf_loading import loading_bytes, model_options, reading_gguf, warn_of_rope
from specplug.model.load.int8 import quantise_linears
from specplug.model.load.library_output import quiet_quantizer, quiet_transformers
from specplug.model.load.packing import pack_linears
from specplug.model.load.quantised import (
    COMPANION,
    becomes_dense,
    check_quantizer,
    companion_bytes,
    is_quantised,
    kernel_bytes,
    prepare,
    stored_bytes,
)
from specplug.model.load.wrappers import text_part
from specplug.model.parallel.group import local_rank
from specplug.model.parallel.layers import localise, sharding_options
from specplug.model.parallel.plan import WHOLE_MODEL, ShardPlan
from specplug.native.gpu import cuda


def load_model(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    towers: Collection[str] = (),
    read_weights: Collection[str] = (),
    trust_remote_code: bool = False,
    shards: ShardPlan = WHOLE_MODEL,
    num_ranks: int = 1,
    quantization: str | None = None,
) -> torch.nn.Module:
    """Loads a causal LM in evaluation mode, with its attention over the paged KV cache.

    Args:
        folder: the checkpoint.
        config: its configuration.
        dtype: of floating weights.
        device: where the weights go.
        towers: modules to leave out, see `Architecture.towers`.
        read_weights: linear layers to leave as they are, see `Architecture.read_weights`.
        trust_remote_code: whether the checkpoint's own code may run.
        shards: how the model is split over ranks; all of them load it at the same time, in one process group.
        num_ranks: how many there are.
        quantization: `int8` quantises the linear layers; None keeps the checkpoint's precision.

    Raises:
        CheckpointError: weights are missing, truncated, of another shape, or in another format.
    """
    register()
    cuda.load() if device.type == "cuda" else native.load()
    read_headers(folder)
    from_gguf = is_gguf(folder)
    prepared, options = prepare(config, device)
    place: AbstractContextManager[None] = nullcontext()
    if num_ranks > 1:
        options, place = sharding_options(shards, num_ranks), local_rank(device)
    try:
        with (
            reading_gguf() if from_gguf else quiet_quantizer() if is_quantised(config) else quiet_transformers(),
            place,
        ):
            model, report = text_part(config, towers).from_pretrained(
                **model_options(folder),
                config=prepared,
                dtype=dtype,
                attn_implementation=IMPLEMENTATION,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, with names and shapes
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except (OSError, RuntimeError, ValueError, ImportError, LookupError) as error:
        raise CheckpointError(f"the weights of {folder} cannot be loaded: {one_line(error, 300)}") from error
    mismatched = report.get("mismatched_keys") or ()
    if mismatched:
        name, stored, expected = min(mismatched)
        raise CheckpointError(
            f"{folder}: {len(mismatched)} weights have another shape than "
            f"{'Transformers makes of the metadata' if from_gguf else 'config.json says'}, first '{name}': {list(stored)}, not "
            f"{list(expected)}; "
            + (
                "give the same model as safetensors"
                if from_gguf
                else "config.json and weights belong to different models"
            )
        )
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing, first '{missing[0]}'")
    left = [name for name in report.get("unexpected_keys") or () if not _is_of(name, towers)]
    check_leftovers(folder, left, config, type(model).__name__)
    if from_gguf:
        warn_of_rope(folder, config)
    disable_padding_checks(model)
    if not options:
        model.to(device)
    model.eval().requires_grad_(False)
    if num_ranks > 1:
        localise(model, shards.rules)
    (quantise_linears if quantization == "int8" else pack_linears)(model, read_weights)
    return model


logger = logging.getLogger("specplug")

# Rotary frequencies, masks and positions that old models stored; towers and heads that text generation does not run.
_HARMLESS = re.compile(
    r"(^|\.)inv_freq$|(^|\.)position_ids$|\.(attn|attention|self_attn)\.(masked_)?bias$"
    r"|(^|\.)(mtp|nextn)|(^|\.)(vision|visual|audio|speech|image|video|embed_vision|embed_audio|talker|token2wav|code2wav)"
    r"|(^|\.)(multi_modal_projector|mm_projector|connector|aligner|v_head|value_head|reward_head)(\.|$)"
    r"|(^|\.)logit_scale$"
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def count_weights(
    folder: Path,
    headers: Mapping[str, TensorHeader],
    config: Any,
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
) -> Architecture:
    """The architecture with the bytes that its weights take as they are stored, from headers alone.

    Args:
        folder: the checkpoint.
        headers: of its tensors.
        config: the model's configuration.
        architecture: with the bytes of dense weights.
        dtype: of floating weights.
        device: where they go.

    Raises:
        CheckpointError: there are scales or integers as weights, and no `quantization_config`; or there is one, and what it
            needs is missing.
    """
    if is_gguf(folder):
        shapes = {name: header.shape for name, header in headers.items()}
        extra = loading_bytes(shapes, config.model_type, dtype, architecture.weight_bytes)
        return attrs.evolve(architecture, loading_bytes=extra if device.type == "cpu" else 0)
    if not is_quantised(config):
        _check_not_quantised(folder, headers, config, architecture)
        return architecture
    used = {
        name: header
        for name, header in headers.items()
        if not _is_harmless(name, config) and not _is_of(name, architecture.towers)
    }
    if check_quantizer(folder, config, dtype, device):
        return architecture
    if becomes_dense(config):
        return attrs.evolve(architecture, weight_bytes=architecture.weight_bytes + companion_bytes(used))
    held = stored_bytes(used, dtype) + kernel_bytes(config, used, dtype, device)
    return attrs.evolve(architecture, weight_bytes=architecture.buffer_bytes + held)


def _check_not_quantised(
    folder: Path, headers: Mapping[str, TensorHeader], config: Any, architecture: Architecture
) -> None:
    known = architecture.tensor_kinds
    scales = [name for name in headers if name.rpartition(".")[2] not in known and _is_scale(name, config)]
    integers = [
        name for name, header in headers.items() if name.endswith(".weight") and not header.dtype.is_floating_point
    ]
    if found := sorted(scales) or sorted(integers):
        raise _raw_numbers(folder, found, architecture.name)


def check_leftovers(folder: Path, names: Collection[str], config: Any, model: str) -> None:
    """Checks the tensors that loading did not use; a warning names those of unknown kind.

    Args:
        folder: the checkpoint.
        names: the tensors.
        config: the model's configuration.
        model: the model class.

    Raises:
        CheckpointError: they are the scales of quantised weights.
    """
    odd = sorted(name for name in names if not _is_harmless(name, config))
    scales = [name for name in odd if COMPANION.search(name)]
    if scales and not is_quantised(config):
        raise _raw_numbers(folder, scales, model)
    if odd:
        logger.warning("%s: %s does not use %s of the checkpoint: %s", folder, model, _count(odd), _first(odd))


def _is_of(name: str, towers: Collection[str]) -> bool:
    return any(tower.rpartition(".")[2] in name.split(".") for tower in towers)


def _is_scale(name: str, config: Any) -> bool:
    return bool(COMPANION.search(name)) and not _is_harmless(name, config)


def _is_harmless(name: str, config: Any) -> bool:
    text = config.get_text_config()
    if _HARMLESS.search(name):
        return True
    if name.endswith("lm_head.weight"):
        return bool(getattr(text, "tie_word_embeddings", False))
    layer = _LAYER.search(name)  # layers after the last predict further tokens (MTP)
    return layer is not None and int(layer.group(1)) >= getattr(text, "num_hidden_layers", 1 << 30)


def _raw_numbers(folder: Path, names: Iterable[str], model: str) -> CheckpointError:
    listed = list(names)
    return CheckpointError(
        f"{folder} holds quantised weights, and its config.json has no quantization_config that says how to read them: "
        f"{model} does not use {_count(listed)}: {_first(listed)}; restore quantization_config, or take a checkpoint that "
        "is not quantised"
    )


def _count(names: Collection[str]) -> str:
    return f"{len(names):,} tensor{'' if len(names) == 1 else 's'}"


def _first(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
