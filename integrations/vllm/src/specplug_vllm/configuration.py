"""From specplug's speculative configuration to the arguments of vLLM. Needs no vLLM; `specplug vllm-config` calls it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from specplug.host import parse_speculative_config
from specplug_vllm.settings import CLASS, KEY, WORKER

DEFAULT_TOKENS = 5
_LIMIT_KEYS = ("num_speculative_tokens", "max_num_speculative_tokens")
NATIVE: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "ngram": ("ngram", ("prompt_lookup_max", "prompt_lookup_min"), ()),
    "draft_model": ("draft_model", ("model", "revision", "draft_sample_method"), ("model",)),
    "eagle": ("eagle", ("model", "revision", "draft_sample_method"), ("model",)),
    "eagle3": ("eagle3", ("model", "revision", "draft_sample_method"), ("model",)),
    "suffix": (
        "suffix",
        (
            "suffix_decoding_max_tree_depth",
            "suffix_decoding_max_cached_requests",
            "suffix_decoding_max_spec_factor",
            "suffix_decoding_min_token_prob",
        ),
        (),
    ),
}
"""Method → vLLM's name of it, the keys that both have, and those that vLLM needs."""
READ_STATES = ("eagle", "eagle3")
"""Methods whose plugins need specplug's worker."""
_NOTES = {
    "suffix": "vLLM's own suffix decoding needs arctic-inference in its environment; without it, use --adapter",
    "ngram": "of several matches of the longest n-gram, vLLM may take another than specplug; use --adapter for specplug's",
}


@attrs.frozen
class VllmArguments:
    """What to give to vLLM.

    Attributes:
        arguments: keyword arguments of `vllm.LLM`.
        notes: what is different from specplug, in words.
    """

    arguments: dict[str, Any]
    notes: list[str]

    def flags(self) -> list[str]:
        """The same as options of `vllm serve`."""
        words = []
        for name, value in self.arguments.items():
            text = value if isinstance(value, str) else json.dumps(value)
            words += [f"--{name.replace('_', '-')}", text]
        return words


def vllm_arguments(config: Mapping[str, Any], *, adapter: bool = False, worker: bool = False) -> VllmArguments:
    """Translates a speculative configuration.

    Args:
        config: specplug's `speculative_config`.
        adapter: whether the plugin is to run also where vLLM has the method itself.
        worker: whether it is to run with specplug's worker, which delivers target states.

    Raises:
        ConfigurationError: the configuration is invalid.
    """
    parsed = parse_speculative_config(config)
    assert parsed is not None
    notes = []
    tokens = parsed.num_speculative_tokens
    if parsed.is_auto:
        if not parsed.is_bounded:
            tokens = DEFAULT_TOKENS
        notes.append(f"drafts have {tokens} tokens: vLLM does not choose their length as 'auto' does")
    native = None if adapter or worker else _native(config, tokens, notes)
    if native is not None:
        return VllmArguments({"speculative_config": native}, notes)
    arguments: dict[str, Any] = {
        "speculative_config": {"method": "custom_class", "model": CLASS, "num_speculative_tokens": tokens},
        "additional_config": {KEY: _without_limits(config)},
    }
    if worker or _reads_states(config):
        arguments["worker_cls"] = WORKER
    return VllmArguments(arguments, notes)


def _native(config: Mapping[str, Any], tokens: int, notes: list[str]) -> dict[str, Any] | None:
    """VLLM's own configuration of the method; None where it has none that is the same."""
    method = config["method"]
    if method not in NATIVE:
        return None
    name, keys, needed = NATIVE[method]
    own = {key: value for key, value in config.items() if key not in ("method", *_LIMIT_KEYS)}
    if other := sorted(own.keys() - set(keys)):
        notes.append(f"vLLM's own {method} has no key '{other[0]}', so the plugin runs")
        return None
    if any(key not in own for key in needed):
        return None
    if method in _NOTES:
        notes.append(_NOTES[method])
    return {"method": name, "num_speculative_tokens": tokens, **own}


def _reads_states(config: Mapping[str, Any]) -> bool:
    """Whether a method of the chain is known to read target states."""
    fallback = config.get("fallback")
    return config["method"] in READ_STATES or (fallback is not None and _reads_states(fallback))


def _without_limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """The plugin's own configuration; how much is drafted is in vLLM's."""
    return {key: value for key, value in config.items() if key not in _LIMIT_KEYS}
