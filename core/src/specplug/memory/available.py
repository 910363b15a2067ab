"""How much memory there is to plan with."""

from __future__ import annotations

import os

import torch

_CPU_SHARE = 0.5
_CUDA_SHARE = 0.9


def default_budget(device: torch.device) -> int:
    """A share of the memory that is free now: 90 % of a GPU's, half of a CPU's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_SHARE)
    return int(_available_host_bytes() * _CPU_SHARE)


def _available_host_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
