"""Trying what does not look best: how much of it, and when, so that a change for the better is noticed."""

from __future__ import annotations

import math
from collections.abc import Sequence

_SHARE, _HOPELESS_SHARE, _USELESS_SHARE, _FIRST_SHARE = 0.015, 0.012, 0.006, 0.03
_FIRST_STEPS, _USELESS_AFTER = 512, 12
_SAVED_STEPS = 4.0
_OFTEN, _NOW_AND_THEN, _RARELY = 2, 8, 32
_NEW, _KNOWN = 24, 256
_CLOSE = 1.5
_NEVER = 1 << 20
_FORESEEN = 256


class Probing:
    """An account of seconds: a share of all steps' time flows in, every probe's expected cost is drawn from it.

    So is the time of seeing that nothing can be tried yet. However useless a speculator, and however many rows there are, what
    is lost to finding out stays a small share.

    Attributes:
        credit: seconds that it holds; below 0 where some was drawn ahead.
        share: of the time that flows in.
    """

    def __init__(self) -> None:
        self.credit = 0.0
        self.share = _FIRST_SHARE
        self._steps = 0
        self._drawn = 0.0
        self._wanted = 0.0
        self._step_seconds = 0.0

    def be_thrifty(self, misses: int) -> None:
        """More flows in while little is known, less where next to nothing that was tried lately came true.

        Args:
            misses: drafts on end that brought nothing, where that leaves little hope for others; else 0.
        """
        if self._steps < _FIRST_STEPS:
            self.share = _FIRST_SHARE
        elif misses >= _USELESS_AFTER:
            self.share = _USELESS_SHARE
        else:
            self.share = _HOPELESS_SHARE if misses else _SHARE

    @property
    def is_sound(self) -> bool:
        """Whether no more was overdrawn than some steps take: what was to pay did not, if more was."""
        return self.credit > -_SAVED_STEPS * self._step_seconds

    def begin(self) -> None:
        """Begins a step."""
        self._drawn = 0.0

    def earn(self, seconds: float) -> None:
        """A step took so long."""
        self._steps += 1
        self._step_seconds += 0.1 * (min(seconds, 4 * self._step_seconds or seconds) - self._step_seconds)
        self.credit = min(self.credit + self.share * seconds, max(_SAVED_STEPS * self._step_seconds, self._wanted))

    def affords(self, cost: float, overdraft: float = 0.0) -> bool:
        """Draws the cost of a probe, if it is there; some may overdraw."""
        if cost <= self.credit + overdraft:
            self.credit -= max(cost, 0.0)
            self._drawn += max(cost, 0.0)
            return True
        self._wanted = max(cost - min(overdraft, 0.0), 0.999 * self._wanted)
        return False

    def settle(self, seconds: float) -> None:
        """What was drawn for took so long; where that is more than was expected, the rest is drawn too."""
        self.credit -= max(0.0, seconds - self._drawn)
        self._drawn = 0.0

    def advance(self, steps: int) -> float:
        """What may be drawn ahead to keep up with a row that will run for so many steps: half of what they earn."""
        return 0.5 * self.share * self._step_seconds * min(steps, _FORESEEN)

    def charge(self, seconds: float) -> None:
        """So long was looked for something to try, in vain."""
        self.credit = min(self.credit, max(0.0, self.credit - seconds))

    def steps_until(self, cost: float, growth: float) -> int:
        """How many steps like those before earn what a probe costs, which grows with every step."""
        earned = self.share * self._step_seconds - growth
        return max(1, math.ceil((cost - self.credit) / earned)) if earned > 0.0 else _NEVER


def vary(depths: list[int], limits: Sequence[int], step: int, timings: int, gain: float) -> tuple[list[int], int]:
    """Now and then something else than the best depths, so that what looks worse is timed too: none, half, one more or less.

    Args:
        depths: the best depths; some are above 0.
        limits: the deepest for each row.
        step: the step's number.
        timings: how many steps like this were timed.
        gain: by what factor the best depths are expected to beat none.

    Returns:
        The depths for this step, and for how many steps, this one included, they are meant.
    """
    often = _OFTEN if timings < _NEW else _NOW_AND_THEN if timings < _KNOWN else _RARELY
    if gain > _CLOSE and timings >= _NEW:  # there something else is unlikely to be better, and costs more
        often *= 2
    turn, between = divmod(step, often)
    if between:
        return depths, often - between
    if turn % 2 == 0:
        return [depth // 2 for depth in depths], 1
    if turn % 4 == 3:
        return [min(depth + 1, limit) if depth else 0 for depth, limit in zip(depths, limits, strict=True)], 1
    if gain < _CLOSE or timings < _NEW:
        return [0] * len(depths), 1
    return [max(depth - 1, 1) if depth else 0 for depth in depths], 1
