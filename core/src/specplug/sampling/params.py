"""Sampling parameters of one request, with vLLM's names and meanings."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from specplug.errors import RequestError

MAX_SEED = 2**63


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise RequestError(f"sampling parameter {name}={value!r}: expected {expected}")


def _token_ids(ids: Iterable[int] | None) -> tuple[int, ...]:
    return tuple(ids or ())


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@attrs.frozen(kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. The target's distribution after all of these is what is sampled from.

    Attributes:
        n: how many completions to generate for the prompt; they share its computed KV blocks.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens (ties included); 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities reach this sum.
        seed: makes the output a function of the request alone: the same in any batch, with any speculator, after
            preemption (float32; in lower precision up to rounding). Completion i of `n` uses seed + i.
        max_tokens: the most tokens to generate; None generates up to the context length.
        stop_token_ids: end the output with any of these.
        ignore_eos: go on after the end-of-sequence token.
        num_speculative_tokens: a cap on draft tokens for this request; 0 turns speculation off; None keeps the engine's.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: tuple[int, ...] = attrs.field(default=(), converter=_token_ids)
    ignore_eos: bool = False
    num_speculative_tokens: int | None = None

    def __attrs_post_init__(self) -> None:
        _check(_is_int(self.n) and self.n >= 1, "n", self.n, "an integer of at least 1")
        _check(
            _is_number(self.temperature) and 0 <= self.temperature < float("inf"),
            "temperature",
            self.temperature,
            "a finite number of at least 0",
        )
        _check(_is_int(self.top_k) and self.top_k >= -1, "top_k", self.top_k, "an integer of at least 1, or 0 for all")
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0, at most 1")
        _check(
            self.seed is None or (_is_int(self.seed) and -MAX_SEED <= self.seed < MAX_SEED),
            "seed",
            self.seed,
            "a 64-bit integer or None",
        )
        _check(
            self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
            "max_tokens",
            self.max_tokens,
            "an integer of at least 1, or None",
        )
        _check(
            all(_is_int(token) and token >= 0 for token in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            "a list of token ids",
        )
        _check(
            self.num_speculative_tokens is None
            or (_is_int(self.num_speculative_tokens) and self.num_speculative_tokens >= 0),
            "num_speculative_tokens",
            self.num_speculative_tokens,
            "an integer of at least 0, or None",
        )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether top_k or top_p can remove tokens."""
        return self.top_k > 0 or self.top_p < 1
