"""Where a model runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplug.errors import ConfigurationError


def choose_device(name: str) -> torch.device:
    """Resolves `auto` or a device's name. A GPU has its index, as tensors on it have: devices are compared.

    Raises:
        ConfigurationError: there is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(
            f"device='{name}' is not the name of a device; use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device='{name}': this machine (or this build of torch) has no CUDA device; use cpu")
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device='{name}' is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
    return device


def computes_ahead(device: torch.device) -> bool:
    """Whether the host goes on while the device computes, so that it pays to leave results there."""
    return device.type != "cpu"


def to_device(
    values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype = torch.long
) -> torch.Tensor:
    """The numbers as a tensor there; the host does not wait for a GPU to fetch them."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True).to(device, non_blocking=True)
