"""Steps in which the automatic budget has nothing to do, because every row sleeps deeply."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.request import Request

_LONGEST, _LONGEST_BY_TOKENS, _MISSES = 6, 32, 3
"""Steps that are skipped at most, and where a gap costs nothing; probes that must have failed in every row before any is."""


class Resting:
    """Leaves rows alone whose last probes all failed, until one is to be woken: their steps then cost what plain ones do.

    Args:
        by_tokens: whether all speculators see tokens alone, so that a gap costs them nothing.

    Attributes:
        is_resting: whether this step is skipped.
    """

    def __init__(self, *, by_tokens: bool) -> None:
        self.is_resting = False
        self._longest = _LONGEST_BY_TOKENS if by_tokens else _LONGEST
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

    def plan(self, requests: Sequence[Request], step: int, *, is_idle: bool) -> None:
        """Decides how many of the next steps are skipped.

        Args:
            requests: the rows.
            step: the number of this step.
            is_idle: whether nothing was asked in it.
        """
        rows = [row for request in requests for row in request.estimates]
        if not is_idle or any(row.depth or row.misses < _MISSES for row in rows):
            self._until = 0
            return
        self._until = min([step + self._longest, *(row.wake_at for row in rows if row.wake_at > step)])
        self._rows = [request.number for request in requests]
