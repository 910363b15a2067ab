"""The keys of the `suffix` method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable


def _within(low: float, high: float, expected: str) -> Callable[[Any, attrs.Attribute[Any], float], None]:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: float) -> None:
        if not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{attribute.name}={value}: expected {expected}")

    return check


@attrs.frozen
class SuffixSettings:
    """The keys of the method, with vLLM's names and defaults where vLLM has them, except the default of the factor.

    vLLM's factor is 1: after a match of one token it drafts one token. Here core decides how much of a draft is verified, by
    its costs and its acceptance, so the method offers more.

    Attributes:
        suffix_decoding_max_tree_depth: the most tokens of a match and its draft together.
        suffix_decoding_max_cached_requests: the most finished outputs in the global tree; 0 switches it off.
        suffix_decoding_max_spec_factor: draft tokens per matched token.
        suffix_decoding_min_token_prob: the least estimated probability of a draft token, given the match.
        suffix_decoding_max_spec_offset: draft tokens in addition to those of the factor. Not a key of vLLM.
        suffix_decoding_max_cached_tokens: the most tokens in the global tree, which bounds its memory. Not a key of vLLM.
    """

    suffix_decoding_max_tree_depth: int = attrs.field(
        default=24, validator=_within(2, math.inf, "an integer of at least 2")
    )
    suffix_decoding_max_cached_requests: int = attrs.field(
        default=10_000, validator=_within(0, math.inf, "an integer of at least 0")
    )
    suffix_decoding_max_spec_factor: float = attrs.field(
        default=4.0, validator=_within(0, math.inf, "a finite number of at least 0")
    )
    suffix_decoding_min_token_prob: float = attrs.field(
        default=0.1, validator=_within(0, 1, "a probability from 0 to 1")
    )
    suffix_decoding_max_spec_offset: float = attrs.field(
        default=0.0, validator=_within(-math.inf, math.inf, "a finite number")
    )
    suffix_decoding_max_cached_tokens: int = attrs.field(
        default=250_000, validator=_within(0, math.inf, "an integer of at least 0")
    )
