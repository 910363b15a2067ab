"""What a speculator declares about itself."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from specplug.values import as_integer, as_tuple, expect, flag, integer, is_integer

Boundary = int | Literal["final"]
"""A point of the target's residual stream: 0…L, where b enters layer b and L leaves the last; or after the final norm."""


def _as_boundaries(value: Any) -> Any:
    several = as_tuple(value)
    return tuple(as_integer(each) for each in several) if isinstance(several, tuple) else several


def _are_boundaries(value: Any) -> bool:
    return isinstance(value, tuple) and all(each == "final" or is_integer(each, 0) for each in value)


@attrs.frozen
class SpeculatorTraits:
    """Optional attribute `traits` of a speculator, of its class or of the object. What is not declared is not computed.

    Attributes:
        hidden_states: target states to receive for every computed position.
        top_k: how many of the target's most likely next tokens, with probabilities, to receive at every computed position.
        top_k_at_drafts: whether to receive the same at every node of a row's last draft, rejected ones included: see
            `ProposalRow.drafted`. Needs `top_k`.
        token_only: the proposal is a function of `row.tokens` (slots are only cache keys). Such a speculator is not
            called for rows with a budget of zero, and keeps its rows after a fault. It is shown no target states.
        max_nodes: the most nodes of a row's draft tree, where that is not `num_speculative_tokens`; it may be more.
        max_depth: the deepest node of a row's draft tree, where that is not `num_speculative_tokens`.
        learns: what it proposes may depend on other requests, those that ended included, and what it keeps of them may
            grow. They may depend on the tokens and states of these, and not on how they were scheduled. The conformance kit
            then does not compare it with a fresh speculator, and benchmarks measure it on prompts it has not seen. Such a
            speculator is not token-only.

    Raises:
        ValueError: a value of the wrong type or range, or two that exclude each other.
    """

    hidden_states: tuple[Boundary, ...] = attrs.field(
        default=(),
        converter=_as_boundaries,
        validator=expect(_are_boundaries, "a tuple of boundaries, each 0 or more, or 'final'", ValueError),
    )
    top_k: int = attrs.field(default=0, **integer(0, ValueError))
    top_k_at_drafts: bool = attrs.field(default=False, **flag(ValueError), kw_only=True)
    token_only: bool = attrs.field(default=False, **flag(ValueError))
    max_nodes: int | None = attrs.field(default=None, **integer(1, ValueError, or_none=True))
    max_depth: int | None = attrs.field(default=None, **integer(1, ValueError, or_none=True))
    learns: bool = attrs.field(default=False, **flag(ValueError))

    def __attrs_post_init__(self) -> None:
        if self.token_only and self.learns:
            raise ValueError(
                "SpeculatorTraits: token_only=True and learns=True: a proposal that depends on other requests is no "
                "function of the row's tokens"
            )
        if self.top_k_at_drafts and not self.top_k:
            raise ValueError("SpeculatorTraits: top_k_at_drafts=True without top_k: say how many tokens are wanted")
        if self.token_only and self.needs_states:
            raise ValueError(
                "SpeculatorTraits: token_only=True with hidden_states or top_k: a proposal that depends on the target's "
                "states is no function of the row's tokens; leave one of them out"
            )

    @property
    def needs_states(self) -> bool:
        """Whether anything of the target's forward must be kept for this speculator."""
        return bool(self.hidden_states) or self.top_k > 0
