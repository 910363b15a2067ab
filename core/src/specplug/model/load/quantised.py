"""Quantised checkpoints, which Transformers' quantizers load: what they need here, and how many bytes they hold."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from specplug.errors import CheckpointError, one_line
from specplug.model.load.checkpoint import TensorHeader, choose_dtype
from specplug.model.load.library_output import quiet_quantizer

# Tensors of quantised weights: scales, zero points, packed integers, of all common formats.
COMPANION = re.compile(
    r"(^|[._])(scales?|scale_inv|scale_\d|zero_points?|qzeros|qweight|g_idx|weight_packed|weight_shape|absmax|quant_map|SCB)$"
    r"|\.quant_state\."
)
_NEED_A_GPU = ("fp8", "mxfp4")  # on a CPU their weights are dequantised while they are read
_INT4_GROUPS = (32, 64, 128, 256)  # of PyTorch's int4 matmul for CPUs


def is_quantised(config: Any) -> bool:
    """Whether a configuration has a `quantization_config`."""
    return bool(_settings(config))


def prepare(config: Any, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """A copy of a configuration and the options of `from_pretrained` with which its weights are loaded.

    Weights are dequantised while they are read where the first forward would do it, and on a CPU where the format's kernels
    need a GPU: then the layers are plain, and our own kernels run them.
    """
    config = copy.deepcopy(config)
    settings = _settings(config)
    if not settings:
        return config, {}
    method = settings.get("quant_method", "")
    if (method in _NEED_A_GPU and device.type == "cpu") or (
        method == "compressed-tensors" and _is_weight_only(settings)
    ):
        settings = {**settings, "dequantize": True}
    config.quantization_config = settings
    # Without a map, bitsandbytes would take a GPU that is there.
    wants_map = device.type != "cpu" or "bitsandbytes" in (settings.get("quant_method") or "bitsandbytes")
    return config, {"device_map": {"": device}} if wants_map else {}


def check_quantizer(folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the weights of a quantised checkpoint are held dense here, after it was checked that they can be loaded.

    Raises:
        CheckpointError: Transformers does not know the format, a package is missing, or the dtype is another than the
            checkpoint's own.
    """
    from transformers.quantizers import AutoHfQuantizer

    config, options = prepare(config, device)
    settings = config.quantization_config
    method = settings.get("quant_method") or "bitsandbytes"
    try:
        with quiet_quantizer():
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=True)
            quantizer.validate_environment(device_map=options.get("device_map"), weights_only=True)
    except ImportError as error:
        raise CheckpointError(
            f"{folder} holds weights quantised by {method}, and a package that reads them is not installed "
            f"({one_line(error, 160)}); install it, or give a checkpoint that is not quantised"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{folder} holds weights quantised by {method}, which Transformers cannot load here ({one_line(error, 160)}); "
            "give a checkpoint that is not quantised"
        ) from error
    own = choose_dtype("auto", config)
    if dtype != own and method != "compressed-tensors":
        raise CheckpointError(
            f"{folder} holds weights quantised by {method} for {_name(own)}; they do not run in {_name(dtype)}: leave dtype "
            "at auto"
        )
    return bool(getattr(quantizer.quantization_config, "dequantize", False))


def stored_bytes(headers: Mapping[str, TensorHeader], dtype: torch.dtype) -> int:
    """Bytes of tensors that are held as they are stored; plain floating ones are converted to `dtype`."""
    return sum(
        torch.Size(header.shape).numel() * (dtype if _is_plain(name, header) else header.dtype).itemsize
        for name, header in headers.items()
    )


def kernel_bytes(config: Any, headers: Mapping[str, TensorHeader], dtype: torch.dtype, device: torch.device) -> int:
    """Bytes by which weights grow when the kernel of their format arranges them, in the first forward.

    gptqmodel's for CPUs, PyTorch's int4 matmul, replaces eight zero points in an int32 by eight offsets and eight pairs of
    scale and offset, and keeps the order of a layer's inputs.
    """
    if device.type != "cpu" or dtype.itemsize != 2 or not _runs_int4_matmul(_settings(config)):
        return 0
    sizes = {name: torch.Size(header.shape).numel() for name, header in headers.items()}
    offsets = sum(size * (8 * 3 * dtype.itemsize - 4) for name, size in sizes.items() if name.endswith(".qzeros"))
    return offsets + sum(4 * size for name, size in sizes.items() if name.endswith(".g_idx"))


def companion_bytes(headers: Mapping[str, TensorHeader]) -> int:
    """Bytes of scales and the like, which are held next to weights that the first forward makes dense."""
    kept = {n: h for n, h in headers.items() if COMPANION.search(n) and not n.endswith("weight_packed")}
    return sum(torch.Size(header.shape).numel() * header.dtype.itemsize for header in kept.values())


def becomes_dense(config: Any) -> bool:
    """Whether the first forward replaces stored weights by dense ones."""
    return _settings(config).get("quant_method") == "compressed-tensors"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _settings(config: Any) -> dict[str, Any]:
    for each in (config, config.get_text_config()):
        if found := getattr(each, "quantization_config", None):
            return dict(found) if isinstance(found, dict) else dict(found.to_dict())
    return {}


def _runs_int4_matmul(settings: Mapping[str, Any]) -> bool:
    return (
        settings.get("quant_method") in ("gptq", "awq")
        and settings.get("bits") == 4
        and settings.get("group_size") in _INT4_GROUPS
        and settings.get("backend", "auto") == "auto"
    )


def _is_weight_only(settings: Mapping[str, Any]) -> bool:
    groups = settings.get("config_groups") or {}
    return not any(
        (group or {}).get(kind) for group in groups.values() for kind in ("input_activations", "output_activations")
    )


def _is_plain(name: str, header: TensorHeader) -> bool:
    return header.dtype.is_floating_point and header.dtype.itemsize > 1 and not COMPANION.search(name)
