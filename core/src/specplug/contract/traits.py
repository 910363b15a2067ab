"""What a speculator declares about itself."""

from __future__ import annotations

from typing import Literal

import attrs

Boundary = int | Literal["final"]
"""A point of the target's residual stream: 0…L, where b enters layer b and L leaves the last; or after the final norm."""


@attrs.frozen
class SpeculatorTraits:
    """Optional attribute `traits` of a speculator, of its class or of the object. What is not declared is not computed.

    Attributes:
        hidden_states: target states to receive for every computed position.
        top_k: how many of the target's most likely next tokens, with probabilities, to receive at every computed position.
        token_only: the proposal is a function of `row.tokens` (slots are only cache keys). Such a speculator is not
            called for rows with a budget of zero, and keeps its rows after a fault.
        max_nodes: the most nodes of a row's draft tree, where that is not `num_speculative_tokens`; it may be more.
        max_depth: the deepest node of a row's draft tree, where that is not `num_speculative_tokens`.
        learns: what it proposes may depend on other requests, those that ended included, and what it keeps of them may
            grow. They may depend on the tokens and states of these, and not on how they were scheduled. The conformance kit
            then does not compare it with a fresh speculator, and benchmarks measure it on prompts it has not seen. Such a
            speculator is not token-only.

    Raises:
        ValueError: it cannot be `token_only` and one that `learns`.
    """

    hidden_states: tuple[Boundary, ...] = ()
    top_k: int = 0
    token_only: bool = False
    max_nodes: int | None = None
    max_depth: int | None = None
    learns: bool = False

    def __attrs_post_init__(self) -> None:
        if self.token_only and self.learns:
            raise ValueError(
                "traits: token_only=True and learns=True: a proposal that depends on other requests is no "
                "function of the row's tokens"
            )

    @property
    def needs_states(self) -> bool:
        """Whether anything of the target's forward must be kept for this speculator."""
        return bool(self.hidden_states) or self.top_k > 0
