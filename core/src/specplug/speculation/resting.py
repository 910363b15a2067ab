"""Steps in which the automatic budget has nothing to do, because every row sleeps."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.request import Request

_LONGEST, _LONGEST_DEEP, _MISSES = 12, 32, 3
"""Steps that are skipped at most, since costs may change; more where every row that was probed failed so often in a row."""


class Resting:
    """Leaves sleeping rows alone until one could be asked for again: their steps then cost what plain ones do.

    Attributes:
        is_resting: whether this step is skipped.
    """

    def __init__(self) -> None:
        self.is_resting = False
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
        rows = [row for request in requests for row in request.estimates]
        is_deep = all(row.misses >= _MISSES or not row.acceptance.first_reached for row in rows)
        self._until = min(step + (_LONGEST_DEEP if is_deep else _LONGEST), wake_at)
        self._rows = [request.number for request in requests]
