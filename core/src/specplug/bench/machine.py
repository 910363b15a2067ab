"""What a measurement was made on and with."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from specplug.version import __version__

_PACKAGES = ("torch", "transformers", "numpy")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, memory, and the GPU if it is used."""
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def describe_versions(packages: dict[str, str]) -> dict[str, str]:
    """Versions of Python, specplug, what it stands on, and the packages of the methods (`package → version`)."""
    found = {"python": platform.python_version(), "specplug": __version__}
    for name in _PACKAGES:
        found[name] = metadata.version(name)
    return found | packages


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
