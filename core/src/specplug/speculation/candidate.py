"""A row that may be given a draft, and how deep that may be."""

from __future__ import annotations

import math

import attrs

from specplug.contract.types import Budget
from specplug.request import Request
from specplug.speculation.estimates import LinkEstimate, RowEstimate


@attrs.define(eq=False)
class Candidate:
    """A row that may be given a draft.

    Attributes:
        place: in the list of wishes.
        request: the row.
        row: what is known of it.
        limit: the deepest draft it can use.
        gap: tokens that a speculator with a state has not taken in.
    """

    place: int
    request: Request
    row: RowEstimate
    limit: int
    gap: int


def deepest_useful(link: LinkEstimate, request: Request) -> int:
    """The deepest draft that a row can use."""
    depth = min(link.depth_to_try, tokens_left(request) - 1)
    cap = request.params.num_speculative_tokens
    return depth if cap is None else min(depth, math.ceil(cap / link.width))


def budget_of(link: LinkEstimate, depth: int) -> Budget:
    """So deep a draft, with as many nodes as the speculator's trees have."""
    return Budget(math.ceil(depth * link.width), depth, link.least_chance, link.least_sum)


def tokens_left(request: Request) -> int:
    """Tokens that a row may still bring."""
    assert request.params.max_tokens is not None
    return request.params.max_tokens - request.num_output_tokens
