"""vLLM's constructor options: the ones that mean something here, and one clear error for each of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import attrs

from specplug.config.engine import EngineConfig
from specplug.errors import ConfigurationError, did_you_mean
from specplug.values import as_integer, shown

_HARMLESS: dict[str, tuple[Any, ...]] = {
    "runner": ("auto", "generate"),
    "tokenizer_mode": ("auto",),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "quantization": (None,),
    "tokenizer_revision": (None,),
    "cpu_offload_gb": (0,),
    "swap_space": (0, 4),
    "enforce_eager": (True, False),
    "disable_custom_all_reduce": (True, False),
    "disable_log_stats": (True, False),
    "enable_chunked_prefill": (True, None),
    "hf_token": (None,),
    "hf_overrides": (None,),
    "max_cpu_loras": (None,),
    "lora_dtype": ("auto", None),
    "fully_sharded_loras": (False,),
    "load_format": ("auto", "safetensors"),
    "kv_cache_dtype": ("auto",),
    "generation_config": ("auto",),
    "compilation_config": (None,),
}
_MEMORY_OPTIONS = ("gpu_memory_utilization", "kv_cache_memory_bytes")
_REASONS = {
    "pipeline_parallel_size": "tensor_parallel_size is what splits a target here",
    "data_parallel_size": "replicas run on Ray Serve, with specplug-ray",
    "quantization": "the checkpoint's own quantization_config decides how its weights are read",
    "max_cpu_loras": "adapters are kept where the target is: see max_loras",
    "lora_dtype": "adapters are kept in the target's dtype",
    "kv_cache_dtype": "keys and values are kept in the model's dtype",
    "load_format": "only safetensors are loaded",
}


def translate_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """VLLM's options → those of `EngineConfig`.

    Options that ask for what is the case here anyway are dropped; those that bound a part of the memory have no counterpart,
    since `memory` bounds everything together.

    Raises:
        ConfigurationError: an option that is unknown, or asks for something that is not supported.
    """
    known = {field.name for field in attrs.fields(EngineConfig)} - {"model", "speculative", "memory"}
    kept = {}
    for name, value in options.items():
        if name in known:
            kept[name] = value
        elif name in _HARMLESS:
            if not any(_is_same(value, harmless) for harmless in _HARMLESS[name]):
                _refuse(name, value)
        elif name in _MEMORY_OPTIONS:
            if value is not None:
                raise ConfigurationError(
                    f"vLLM's option {name} is not supported: give memory, which bounds weights, KV caches and buffers together"
                )
        else:
            near = did_you_mean(name, {*known, *_HARMLESS, "memory", "speculative_config"})
            raise ConfigurationError(f"LLM has no option '{name}'{near}")
    return kept


def _is_same(value: Any, harmless: Any) -> bool:
    """Whether two values are equal, where True is not 1."""
    value = as_integer(value)
    if isinstance(value, bool) != isinstance(harmless, bool):
        return False
    return isinstance(value, (str, int, float, type(None))) and bool(value == harmless)


def _refuse(name: str, value: Any) -> NoReturn:
    harmless = _HARMLESS[name]
    if {True, False} == set(harmless):  # either is the case here
        raise ConfigurationError(f"vLLM's option {name}={shown(value)}: expected True or False")
    reason = _REASONS.get(name, "it has no counterpart here")
    raise ConfigurationError(f"vLLM's option {name}={shown(value)} is not supported: {reason}")
