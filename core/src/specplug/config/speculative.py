"""Parsing the speculative configuration: a method, its keys, and perhaps a fallback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specplug.contract.settings import SpeculativeConfig
from specplug.errors import ConfigurationError
from specplug.values import as_integer, is_integer, shown

AUTO = "auto"
DEFAULT_MAX_SPECULATIVE_TOKENS = 8
"""The most draft tokens of a row where core chooses, unless the user or the plugin says otherwise."""
_LONGEST_CHAIN = 8


def parse_speculative_config(mapping: Mapping[str, Any] | None) -> SpeculativeConfig | None:
    """Parses what a user wrote. Keys that belong to a method are kept for its plugin to read.

    Raises:
        ConfigurationError: not a mapping, no method, or a common key of the wrong type.
    """
    return None if mapping is None else _parse(mapping, depth=1)


def _parse(mapping: Mapping[str, Any], depth: int) -> SpeculativeConfig:
    if not isinstance(mapping, Mapping):
        raise ConfigurationError(f"speculative_config: expected a mapping, got {shown(mapping)}")
    if depth > _LONGEST_CHAIN:
        raise ConfigurationError(f"speculative_config: more than {_LONGEST_CHAIN} fallbacks in a row")
    options = dict(mapping)
    for key in options:
        if not isinstance(key, str):
            raise ConfigurationError(f"speculative_config: the key {shown(key)} is no text")
    method = options.pop("method", None)
    if not isinstance(method, str) or not method:
        got = "" if method is None else f", got {shown(method)}"
        raise ConfigurationError(
            f"speculative_config needs 'method', the name of an installed speculator (see: specplug list){got}"
        )
    tokens, is_auto, bounded = _parse_tokens(options)
    fallback = options.pop("fallback", None)
    return SpeculativeConfig(
        method=method,
        num_speculative_tokens=tokens,
        options=options,
        fallback=None if fallback is None else _parse(fallback, depth + 1),
        is_auto=is_auto,
        is_bounded=bounded,
    )


def _parse_tokens(options: dict[str, Any]) -> tuple[int, bool, bool]:
    """Takes the keys on how much is drafted: (most draft tokens of a row, whether core chooses, whether that was given)."""
    tokens = as_integer(options.pop("num_speculative_tokens", AUTO))
    bound = as_integer(options.pop("max_num_speculative_tokens", None))
    if not (isinstance(tokens, str) and tokens == AUTO):
        if not is_integer(tokens, 1):
            raise ConfigurationError(
                f"speculative_config: num_speculative_tokens={shown(tokens)}: expected an integer of at least 1, or '{AUTO}'"
            )
        if bound is not None:
            raise ConfigurationError(
                f"speculative_config: max_num_speculative_tokens={shown(bound)} bounds num_speculative_tokens='{AUTO}'; with "
                f"num_speculative_tokens={tokens} leave it out"
            )
        return tokens, False, True
    if bound is not None and not is_integer(bound, 1):
        raise ConfigurationError(
            f"speculative_config: max_num_speculative_tokens={shown(bound)}: expected an integer of at least 1"
        )
    return DEFAULT_MAX_SPECULATIVE_TOKENS if bound is None else bound, True, bound is not None
