"""Parsing the speculative configuration: a method, its keys, and perhaps a fallback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specplug.contract.settings import SpeculativeConfig
from specplug.errors import ConfigurationError

DEFAULT_NUM_SPECULATIVE_TOKENS = 5
_LONGEST_CHAIN = 8


def parse_speculative_config(mapping: Mapping[str, Any] | None) -> SpeculativeConfig | None:
    """Parses what a user wrote. Keys that belong to a method are kept for its plugin to read.

    Raises:
        ConfigurationError: not a mapping, no method, or a common key of the wrong type.
    """
    return None if mapping is None else _parse(mapping, depth=1)


def _parse(mapping: Mapping[str, Any], depth: int) -> SpeculativeConfig:
    if not isinstance(mapping, Mapping):
        raise ConfigurationError(f"speculative_config: expected a mapping, got {mapping!r}")
    if depth > _LONGEST_CHAIN:
        raise ConfigurationError(f"speculative_config: more than {_LONGEST_CHAIN} fallbacks in a row")
    options = dict(mapping)
    method = options.pop("method", None)
    if not isinstance(method, str) or not method:
        raise ConfigurationError(
            "speculative_config needs 'method', the name of an installed speculator (see: specplug list)"
        )
    tokens = options.pop("num_speculative_tokens", DEFAULT_NUM_SPECULATIVE_TOKENS)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ConfigurationError(
            f"speculative_config: num_speculative_tokens={tokens!r}: expected an integer of at least 1"
        )
    fallback = options.pop("fallback", None)
    return SpeculativeConfig(
        method=method,
        num_speculative_tokens=tokens,
        options=options,
        fallback=None if fallback is None else _parse(fallback, depth + 1),
    )
