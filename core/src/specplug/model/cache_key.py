"""What things that are kept on disk depend on, as the names of their files."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from specplug.version import __version__

_NAMES_ONLY = ("_name_or_path", "transformers_version")  # say where a configuration came from, not what it is


def cache_key(name: str, facts: dict[str, Any]) -> str:
    """A name with a digest of some facts, and of the versions of everything that computes."""
    import transformers

    versions = [__version__, torch.__version__, transformers.__version__]
    text = json.dumps({**facts, "versions": versions}, sort_keys=True, default=str)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def config_facts(config: Any) -> Any:
    """A model's configuration, as far as it changes what is computed."""
    return _without_names(config.to_dict())


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_names(inner) for key, inner in value.items() if key not in _NAMES_ONLY}
    return value


def device_name(device: torch.device) -> str:
    """The kind of device; of a GPU also which, and what it can do."""
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
