"""Budgets of one speculator's rows that hold for some steps: as long as the depths do that were found best."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from specplug.request import Request
from specplug.speculation.estimates import RowEstimate
from specplug.speculation.policy import Wish


@attrs.frozen(eq=False)
class HeldPlan:
    """What a speculator was asked for, to be asked for again.

    Attributes:
        numbers: of the requests that it may be asked for.
        wishes: what each may draft.
        asked: those that draft, and how deep.
        until: the step in which it ends.
    """

    numbers: list[int]
    wishes: list[Wish]
    asked: list[tuple[Request, RowEstimate, int]]
    until: int

    def holds(self, requests: Sequence[Request], step: int) -> bool:
        """Whether it may still be used for these rows."""
        return step < self.until and self.numbers == [request.number for request in requests]
