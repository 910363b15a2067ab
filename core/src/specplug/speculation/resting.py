"""Steps in which the automatic budget has nothing to do, because every row sleeps."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.request import Request

_LONGEST, _LONGEST_DEEP, _MISSES = 12, 32, 3
"""Steps that are skipped at most, since costs may change; more where every row that was probed failed so often in a row."""
Timing = tuple[int, float, bool]
"""Rows of a step, its seconds, and whether all of them decoded."""


class Resting:
    """Leaves sleeping rows alone until one could be asked for again: their steps then cost what plain ones do.

    Attributes:
        is_resting: whether this step is skipped.
        is_forbidden: whether a row drafts, or nearly would: then none is skipped.
    """

    def __init__(self) -> None:
        self.is_resting = False
        self.is_forbidden = False
        self._probed = False
        self._wake_at: int | None = None
        self._rows: list[int] = []
        self._until = 0
        self._timings: list[Timing] = []

    def holds(self, requests: Sequence[Request], step: int) -> bool:
        """Whether this step is skipped: no row has come, gone or got a prompt to compute."""
        self.is_resting = (
            step < self._until
            and self._rows == [request.number for request in requests]
            and all(request.num_pending == 1 for request in requests)
        )
        return self.is_resting

    def keep_timing(self, rows: int, seconds: float, *, decoding: bool) -> None:
        """Keeps what a skipped step took."""
        self._timings.append((rows, seconds, decoding))

    def take_timings(self) -> list[Timing]:
        """What the skipped steps took."""
        taken, self._timings = self._timings, []
        return taken

    def begin(self) -> None:
        """Begins a step that is not skipped."""
        self.is_forbidden = self._probed = False
        self._wake_at = None
        self._until = 0

    def forbid(self) -> None:
        """The next step is not skipped."""
        self.is_forbidden = True

    def wake(self, at: int | None, *, probes: bool = False) -> None:
        """Notes a step in which a row could be asked for, and whether one is probed now."""
        self._probed = self._probed or probes
        if at is not None:
            self._wake_at = at if self._wake_at is None else min(self._wake_at, at)

    @property
    def probes(self) -> bool:
        """Whether rows were probed in this step and none drafts: what comes of the probes decides when the next are due."""
        return self._probed and not self.is_forbidden

    def plan(self, requests: Sequence[Request], step: int, most: int | None = None) -> None:
        """Decides how many of the steps after this one are skipped, `most` at most."""
        if self.is_forbidden:
            return
        rows = [row for request in requests for row in request.estimates]
        is_deep = all(row.misses >= _MISSES or not row.acceptance.first_reached for row in rows)
        self._until = step + (most or (_LONGEST_DEEP if is_deep else _LONGEST))
        if self._wake_at is not None:
            self._until = min(self._until, self._wake_at)
        self._rows = [request.number for request in requests]
