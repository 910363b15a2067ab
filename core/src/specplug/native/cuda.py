"""Kernels for NVIDIA GPUs, in Triton, which comes with CUDA builds of PyTorch and compiles them when they are first used."""

from __future__ import annotations

import logging
import os
from functools import lru_cache

import torch

logger = logging.getLogger("specplug")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


@lru_cache(maxsize=1)
def load() -> bool:
    """Registers the kernels; whether they can be used from now on. `SPECPLUG_NATIVE=0` switches them off."""
    if os.environ.get("SPECPLUG_NATIVE", "1") == "0" or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        return False
    try:
        from specplug.native import triton_attention, triton_linear
    except ImportError as error:
        logger.warning("GPU kernels are not used, PyTorch's are: %s", error)
        return False
    import specplug.native.operators  # noqa: F401 - the schemas

    for name, function in (
        ("attend", triton_attention.attend),
        ("linear", triton_linear.linear),
        ("linears_2", triton_linear.linears),
        ("linears_3", triton_linear.linears),
    ):
        torch.library.impl(f"specplug::{name}", "cuda", function)
    return True


def can_attend(keys: torch.Tensor) -> bool:
    """Whether the attention kernel serves this cache."""
    from specplug.native.triton_sizes import MOST_SHARES

    return keys.dtype in _DTYPES and keys.shape[0] <= MOST_SHARES // 8 and keys.shape[2] <= 256 and load()
