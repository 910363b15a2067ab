"""Trying what does not look best: how much of it, and when, so that a change for the better is noticed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specplug.speculation.adaptive.settings import AdaptiveSettings

_NEVER = 1 << 20


class ExplorationBudget:
    """A ledger of seconds: a share of all steps' time flows in, every trial's expected cost is drawn from it.

    So is the time of seeing that nothing can be tried yet. However useless a speculator, and however many rows there are, what
    is lost to finding out stays a small share.

    Attributes:
        credit: seconds that it holds; below 0 where some was drawn ahead.
        share: of the time that flows in.
    """

    def __init__(self, settings: AdaptiveSettings) -> None:
        self._settings = settings
        self.credit = 0.0
        self.share = settings.first_share
        self._steps = 0
        self._drawn = 0.0
        self._wanted = 0.0
        self._step_seconds = 0.0

    def adjust_share(self, misses: int) -> None:
        """More flows in while little is known, less where next to nothing that was tried lately came true.

        Args:
            misses: drafts in a row that brought nothing, where that leaves little hope for others; else 0.
        """
        settings = self._settings
        if self._steps < settings.first_share_steps:
            self.share = settings.first_share
        elif misses >= settings.useless_misses:
            self.share = settings.useless_share
        else:
            self.share = settings.hopeless_share if misses else settings.share

    @property
    def is_sound(self) -> bool:
        """Whether no more was overdrawn than some steps take: what was to pay did not, if more was."""
        return self.credit > -self._settings.saved_steps * self._step_seconds

    def begin(self) -> None:
        """Begins a step."""
        self._drawn = 0.0

    def earn(self, seconds: float) -> None:
        """A step took so long."""
        self._steps += 1
        self._step_seconds += 0.1 * (min(seconds, 4 * self._step_seconds or seconds) - self._step_seconds)
        most = max(self._settings.saved_steps * self._step_seconds, self._wanted)
        self.credit = min(self.credit + self.share * seconds, most)

    def affords(self, cost: float, overdraft: float = 0.0) -> bool:
        """Draws the cost of a trial, if it is there; some may overdraw."""
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
        return 0.5 * self.share * self._step_seconds * min(steps, self._settings.foreseen_steps)

    def charge(self, seconds: float) -> None:
        """So long was looked for something to try, in vain."""
        self.credit = min(self.credit, max(0.0, self.credit - seconds))

    def steps_until(self, cost: float, growth: float) -> int:
        """How many steps like those before earn what a trial costs, which grows with every step."""
        earned = self.share * self._step_seconds - growth
        return max(1, math.ceil((cost - self.credit) / earned)) if earned > 0.0 else _NEVER


def vary(
    settings: AdaptiveSettings, depths: list[int], limits: Sequence[int], step: int, timings: int, gain: float
) -> tuple[list[int], int]:
    """Now and then something else than the best depths, so that what looks worse is timed too: none, half, one more or less.

    Args:
        settings: how often.
        depths: the best depths; some are above 0.
        limits: the deepest for each row.
        step: the step's number.
        timings: how many steps like this were timed.
        gain: by what factor the best depths are expected to beat none.

    Returns:
        The depths for this step, and for how many steps, this one included, they are meant.
    """
    is_new, is_close = timings < settings.new_timings, gain <= settings.close_gain
    known = timings >= settings.known_timings
    often = settings.vary_new if is_new else settings.vary_known if known else settings.vary_every
    if not is_close and not is_new:  # there something else is unlikely to be better, and costs more
        often *= 2
    turn, between = divmod(step, often)
    if between:
        return depths, often - between
    if turn % 2 == 0:
        return [depth // 2 for depth in depths], 1
    if turn % 4 == 3:
        return [min(depth + 1, limit) if depth else 0 for depth, limit in zip(depths, limits, strict=True)], 1
    if gain < settings.close_gain or is_new:
        return [0] * len(depths), 1
    return [max(depth - 1, 1) if depth else 0 for depth in depths], 1
