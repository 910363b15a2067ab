"""Runs specplug's speculators inside vLLM; see docs/vllm.md. Names are imported when they are first used: one needs vLLM."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specplug_vllm.configuration import VllmArguments, vllm_arguments
    from specplug_vllm.proposer import SpecplugProposer
    from specplug_vllm.worker import Worker

_HOMES = {
    "SpecplugProposer": "specplug_vllm.proposer",
    "VllmArguments": "specplug_vllm.configuration",
    "Worker": "specplug_vllm.worker",
    "vllm_arguments": "specplug_vllm.configuration",
}

__all__ = ["SpecplugProposer", "VllmArguments", "Worker", "vllm_arguments"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specplug_vllm' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
