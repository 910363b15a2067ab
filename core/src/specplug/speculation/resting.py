"""Steps in which the automatic budget has nothing to do, because every row sleeps."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.request import Request

_LONGEST, _LONGEST_BY_TOKENS, _MISSES = 12, 32, 3
"""Steps that are skipped at most; where a gap costs nothing, and probes have failed so often in every row, more."""


class Resting:
    """Leaves sleeping rows alone until one could be asked for again: their steps then cost what plain ones do.

    Args:
        by_tokens: whether all speculators see tokens alone, so that a gap costs them nothing.

    Attributes:
        is_resting: whether this step is skipped.
    """

    def __init__(self, *, by_tokens: bool) -> None:
        self.is_resting = False
        self._by_tokens = by_tokens
        self._rows: list[int] = []
        self._until = 0

    def begin(self, requests: Sequence[Request], step: int) -> bool:
        """Whether this step is skipped: no row has come, gone or got a prompt to compute."""
        self.is_resting = (
            step < self._until
            and self._rows == [request.number for request in requests]
            and all(request.num_pending == 1 for request in requests)
        )
        return self.is_resting

    def plan(self, requests: Sequence[Request], step: int, wake_at: int | None) -> None:
        """Decides how many of the next steps are skipped.

        Args:
            requests: the rows.
            step: the number of this step.
            wake_at: the first step in which a row could be asked for; None if one drafts.
        """
        if wake_at is None:
            self._until = 0
            return
        longest = _LONGEST
        if self._by_tokens and all(row.misses >= _MISSES for request in requests for row in request.estimates):
            longest = _LONGEST_BY_TOKENS
        self._until = min(step + longest, wake_at)
        self._rows = [request.number for request in requests]
