"""What a step holds so far, and what more drafts would make of it. Knows nothing about rows' texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from specplug.speculation.allocation import allocate, might_pay
from specplug.speculation.curve import CostCurve
from specplug.speculation.estimates import LinkEstimate
from specplug.speculation.row_costs import RowCosts

_VERIFY_SLOPE, _LEAST_SLOPE = 0.015, 0.003
"""Beforehand, one more token to verify is taken to cost so much of a step; and never less than that."""
_CAUTION = 0.8
_NEGLIGIBLE = 0.01
_LIKELY = 0.9
"""How likely a further token of a chain must be at most to be drafted."""
_WARM_SHARE = 0.5
"""As much of what asking takes now and then it may take in every step."""
_UNKNOWN = CostCurve(_VERIFY_SLOPE, least_slope=_LEAST_SLOPE)
_UNKNOWN.observe(0, 1e-3)


def target_costs() -> RowCosts:
    """Seconds of target steps over their draft nodes, before anything is known."""
    return RowCosts(lambda: CostCurve(_VERIFY_SLOPE, least_slope=_LEAST_SLOPE))


class Prospect:
    """The step that is being prepared.

    Attributes:
        rows: rows that will decode in it.
        nodes: draft nodes that it holds already.
        tokens: tokens that it is expected to bring so far.
        spent: seconds spent on it so far, beside the target's.
        curve: seconds of a target step over its draft nodes.
    """

    def __init__(self, rows: int, targets: RowCosts) -> None:
        self.rows = rows
        self.nodes = 0
        self.tokens = float(rows)
        self.spent = 0.0
        self.curve = targets.of(max(1, rows)) or _UNKNOWN
        self._targets = targets
        self._asking = 1.0

    def if_warm(self) -> Prospect:
        """The same, if drafts cost as much less as they may when they are made in every step."""
        view = Prospect(self.rows, self._targets)
        view.nodes, view.tokens, view.spent = self.nodes, self.tokens, self.spent
        view.curve = CostCurve(_VERIFY_SLOPE, least_slope=_LEAST_SLOPE)
        view.curve.observe(0, self.curve.seconds(0))
        view._asking = _WARM_SHARE
        return view

    @property
    def timings(self) -> int:
        """How many steps like this were timed; see `RowCosts.count`."""
        return self._targets.count(max(1, self.rows))

    @property
    def rate(self) -> float:
        """Tokens per second as it stands."""
        return self.tokens / (self.curve.seconds(self.nodes) + self.spent)

    @property
    def least_gain(self) -> float:
        """A chance of being accepted below which no node can pay."""
        target = self.curve.seconds
        here = target(self.nodes)
        return max(0.002, 0.5 * self.tokens * (target(self.nodes + 1) - here) / here)

    def is_negligible(self, seconds: float) -> bool:
        """Whether a time hardly counts."""
        return seconds < _NEGLIGIBLE * self.curve.seconds(0)

    def divide(
        self, link: LinkEstimate, gains: Sequence[Sequence[float]], margin: float = 1.0
    ) -> tuple[list[int], float]:
        """The best depths for rows whose nodes have these chances, and the rate; see `allocate`."""
        fill = 1.0 if self.is_negligible(link.ask_seconds(1, 1)) else max(link.fill, 0.02)
        times = self._asking / fill
        return self._allocate(
            link,
            gains,
            link.ask_table if times == 1.0 else lambda rows: [times * seconds for seconds in link.ask_table(rows)],
            margin,
        )

    def _allocate(
        self,
        link: LinkEstimate,
        gains: Sequence[Sequence[float]],
        ask: Callable[[int], Sequence[float]],
        margin: float = 1.0,
    ) -> tuple[list[int], float]:
        width = link.nodes_at
        most = self.nodes + 1 + math.ceil(max(width) * sum(map(len, gains)))
        target, level = self.curve.shapes(most)
        return allocate(
            gains,
            tokens=self.tokens,
            nodes=self.nodes,
            width=width,
            target=target,
            ask=ask,
            level=level,
            spent=self.spent,
            margin=margin,
        )

    def least_chances(self, link: LinkEstimate, depths: Sequence[int], rate: float) -> tuple[float, float]:
        """How likely chains must be for another token to pay at this rate: `least_chance` and `least_sum` of `Budget`."""
        depth = max(depths)
        if depth < 2:
            return 0.0, 0.0
        rows = sum(map(bool, depths))
        nodes = max(1, round(sum(sum(link.nodes_at[:own]) for own in depths)))
        verifying = (self.curve.seconds(self.nodes + nodes) - self.curve.seconds(self.nodes)) / nodes
        worth = rate / min(link.calibration, 1.0)  # who is too modest about all may still be right about the sure ones
        own = min(verifying * worth, _LIKELY)
        return own, min(link.level_seconds(rows, depth) * worth, rows * (_LIKELY - own))

    def might_pay(self, link: LinkEstimate, gains: Sequence[Sequence[float]]) -> bool:
        """Whether the drafts would pay if all of them cost no more than the shortest."""
        seconds = self.curve.seconds(self.nodes) + self.spent
        cheapest = min(link.ask_seconds(1, 1), link.ask_seconds(len(gains), 1))
        return might_pay(gains, tokens=self.tokens, rate=self.rate, seconds=seconds, cheapest=cheapest)

    def worth(self, link: LinkEstimate, gains: Sequence[float]) -> float:
        """The rate that the best draft of one row adds, where the row bears its share of asking."""
        _, rate = self._allocate(
            link, [gains], lambda rows: [seconds / self.rows for seconds in link.ask_table(self.rows)]
        )
        return rate - self.rate

    def repays(self, link: LinkEstimate, gap: int, tokens_left: int, rate: float) -> bool:
        """Whether a speculator that would bring the batch to this rate is worth what it must take in of a row before."""
        saved = 1.0 / self.rate - 1.0 / rate
        return link.feed * gap < _CAUTION * saved * tokens_left
