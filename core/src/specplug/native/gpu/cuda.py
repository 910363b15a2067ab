"""Kernels for NVIDIA GPUs, in Triton, which comes with CUDA builds of PyTorch and compiles them when they are first used."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import lru_cache

import torch

from specplug.cache_folder import CacheError, private_folder
from specplug.native.gpu.sizes import MOST_SHARES

logger = logging.getLogger("specplug")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)
_WIDEST_HEAD = 256


@lru_cache(maxsize=1)
def load() -> bool:
    """Registers the kernels; whether they are there. `SPECPLUG_NATIVE=0` switches them off."""
    if os.environ.get("SPECPLUG_NATIVE", "1") == "0" or not torch.cuda.is_available():
        return False
    try:
        from specplug.native.gpu import attention, linear
    except ImportError as error:
        logger.warning("GPU kernels are not used, PyTorch's are: %s", error)
        return False
    _keep_compiled_kernels()
    import specplug.native.operators  # noqa: F401 - the schemas

    for name, function in (
        ("attend", attention.attend),
        ("linear", linear.linear),
        ("linears_2", linear.linears),
        ("linears_3", linear.linears),
    ):
        torch.library.impl(f"specplug::{name}", "cuda", function)
    return True


def _keep_compiled_kernels() -> None:
    """Triton's cache lies in our own, unless the user named one.

    PyTorch's compiler sets the variable where nobody has, for the whole process, to a folder that goes with the artifact it
    happens to work on: the kernels of all others would be compiled anew with every start.
    """
    with suppress(CacheError):
        os.environ.setdefault("TRITON_CACHE_DIR", str(private_folder("triton")))


@lru_cache(maxsize=64)
def works_on(device: torch.device) -> bool:
    """Whether the kernels can be used on a GPU; where they cannot, one line of warning says why."""
    if not load():
        return False
    reason = _obstacle(device)
    if reason:
        logger.warning("GPU kernels are not used on %s, PyTorch's are: %s", device, reason)
    return not reason


def can_attend(keys: torch.Tensor) -> bool:
    """Whether the attention kernel serves this cache; where it does not, one line of warning says why."""
    return works_on(keys.device) and not _misfit(keys.shape[0], keys.shape[2], keys.dtype)


@lru_cache(maxsize=64)
def _misfit(heads: int, dim: int, dtype: torch.dtype) -> str:
    reason = misfit(heads, dim, dtype)
    if reason:
        logger.warning("the GPU's attention kernel is not used, PyTorch's is: %s", reason)
    return reason


def misfit(heads: int, dim: int, dtype: torch.dtype) -> str:
    """Why the attention kernel does not serve a cache of that shape; empty if it does."""
    if dtype not in _DTYPES:
        return f"the cache's dtype is {dtype}"
    if heads > MOST_SHARES:
        return f"the cache has {heads} heads, more than {MOST_SHARES}"
    if dim > _WIDEST_HEAD:
        return f"its heads are {dim} wide, more than {_WIDEST_HEAD}"
    return ""


def _obstacle(device: torch.device) -> str:
    """Why the kernels do not run on a GPU; empty if they do. The first time, this compiles one."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"its compute capability is {capability[0]}.{capability[1]}, and they need 8.0"
    from specplug.native.gpu.argmax import argmax

    try:
        argmax(torch.zeros(1, 8, device=device, dtype=torch.float32))
    except Exception as error:  # no C compiler, an unwritable cache, a driver too old: of many kinds
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
