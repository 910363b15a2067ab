"""Goodput: the expected tokens per second of a step, and the depths that maximise it. Knows nothing about rows' texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from specplug.speculation.adaptive.cost_model import CostModel, target_curve
from specplug.speculation.adaptive.estimates import SpeculatorEstimate
from specplug.speculation.adaptive.settings import AdaptiveSettings


class StepForecast:
    """The step that is being prepared.

    Attributes:
        rows: rows that will decode in it.
        nodes: draft nodes that it holds already.
        tokens: tokens that it is expected to bring so far.
        spent: seconds spent on it so far, apart from the target's.
        curve: seconds of a target step over its draft nodes.
    """

    def __init__(self, rows: int, targets: CostModel, settings: AdaptiveSettings) -> None:
        self.rows = rows
        self.nodes = 0
        self.tokens = float(rows)
        self.spent = 0.0
        curve = targets.of(max(1, rows))
        if curve is None:
            curve = target_curve(settings)
            curve.observe(0, 1e-3)
        self.curve = curve
        self._targets = targets
        self._settings = settings
        self._call_share = 1.0

    def if_warm(self) -> StepForecast:
        """The same, if drafts cost as much less as they may when they are made in every step."""
        view = StepForecast(self.rows, self._targets, self._settings)
        view.nodes, view.tokens, view.spent = self.nodes, self.tokens, self.spent
        view.curve = target_curve(self._settings)
        view.curve.observe(0, self.curve.seconds(0))
        view._call_share = self._settings.warm_share
        return view

    @property
    def timings(self) -> int:
        """How many steps like this were timed; see `CostModel.count`."""
        return self._targets.count(max(1, self.rows))

    @property
    def rate(self) -> float:
        """Tokens per second as it stands."""
        return self.tokens / (self.curve.seconds(self.nodes) + self.spent)

    @property
    def least_gain(self) -> float:
        """A probability of being accepted below which no node can pay."""
        here, one, two = (self.curve.seconds(self.nodes + more) for more in range(3))
        return max(0.002, 0.5 * self.tokens * min(one - here, two - one) / here)  # the first node may cost a jump

    def is_negligible(self, seconds: float) -> bool:
        """Whether a time hardly counts."""
        return seconds < self._settings.negligible * self.curve.seconds(0)

    def divide(
        self, estimate: SpeculatorEstimate, gains: Sequence[Sequence[float]], margin: float = 1.0
    ) -> tuple[list[int], float]:
        """The best depths for rows whose nodes have these probabilities, and the rate; see `allocate`."""
        fill = 1.0 if self.is_negligible(estimate.seconds(1, 1)) else max(estimate.fill, 0.02)
        times = self._call_share / fill
        call = estimate.seconds_by_depth
        if times != 1.0:
            return self._allocate(estimate, gains, lambda rows: [times * seconds for seconds in call(rows)], margin)
        return self._allocate(estimate, gains, call, margin)

    def _allocate(
        self,
        estimate: SpeculatorEstimate,
        gains: Sequence[Sequence[float]],
        call: Callable[[int], Sequence[float]],
        margin: float = 1.0,
    ) -> tuple[list[int], float]:
        width = estimate.nodes_at
        most = self.nodes + 1 + math.ceil(max(width) * sum(map(len, gains)))
        target, level = self.curve.shapes(most)
        return allocate(
            gains,
            tokens=self.tokens,
            nodes=self.nodes,
            width=width,
            target=target,
            call=call,
            level=level,
            spent=self.spent,
            margin=margin,
        )

    def min_gains(self, estimate: SpeculatorEstimate, depths: Sequence[int], rate: float) -> tuple[float, float]:
        """What another token of chains must gain to pay at this rate: `min_probability` and `min_surplus` of `Budget`."""
        depth = max(depths)
        if depth < 2:
            return 0.0, 0.0
        rows = sum(map(bool, depths))
        nodes = max(1, round(sum(sum(estimate.nodes_at[:own]) for own in depths)))
        verifying = (self.curve.seconds(self.nodes + nodes + 1) - self.curve.seconds(self.nodes + 1)) / nodes
        worth = rate / min(
            estimate.calibration, 1.0
        )  # who is too modest about all may still be right about the sure ones
        likely = self._settings.likely
        own = min(verifying * worth, likely)
        return own, min(estimate.level_seconds(rows, depth) * worth, rows * (likely - own))

    def might_pay(self, estimate: SpeculatorEstimate, gains: Sequence[Sequence[float]]) -> bool:
        """Whether the drafts would pay if all of them cost no more than the shortest."""
        seconds = self.curve.seconds(self.nodes) + self.spent
        cheapest = min(estimate.seconds(1, 1), estimate.seconds(len(gains), 1))
        return might_pay(gains, tokens=self.tokens, rate=self.rate, seconds=seconds, cheapest=cheapest)

    def worth(self, estimate: SpeculatorEstimate, gains: Sequence[float]) -> float:
        """The rate that the best draft of one row adds, where the row bears its share of the call."""
        rows = self.rows
        _, rate = self._allocate(
            estimate, [gains], lambda _: [seconds / rows for seconds in estimate.seconds_by_depth(rows)]
        )
        return rate - self.rate

    def repays(self, cost: float, tokens_left: int, rate: float) -> bool:
        """Whether a speculator that would bring the batch to this rate is worth so many seconds of catching up with a row."""
        saved = 1.0 / self.rate - 1.0 / rate
        return cost < self._settings.caution * saved * tokens_left


def allocate(
    gains: Sequence[Sequence[float]],
    *,
    tokens: float,
    nodes: int,
    width: Sequence[float],
    target: Sequence[float],
    call: Callable[[int], Sequence[float]],
    level: float = 1.0,
    spent: float = 0.0,
    margin: float = 1.0,
) -> tuple[list[int], float]:
    """Maximises (expected tokens) / (target step + proposal), so a costly speculator is asked for many rows or for none.

    First the best depth for all rows together is searched, since a proposal costs by the deepest; up to that depth the most
    likely node is added, again and again, and the best prefix of that order is kept. Of one row the nodes come in order, since
    gains never rise along it.

    Args:
        gains: for each row the probability that its node at depth 1, 2, … is accepted, non-increasing.
        tokens: what the step is expected to bring without these drafts: one per row, and what other drafts bring.
        nodes: draft nodes that the step holds already.
        width: verified nodes that a draft has at depth 1, 2, …; 1 for a chain, less where it may have stopped.
        target: seconds of a target step with 0, 1, 2, … draft nodes, as many as all of these at least, over `level`.
        call: seconds of a proposal for so many rows: 1 deep, 2 deep, …
        level: what `target` is to be multiplied by.
        spent: seconds of the step that are spent already.
        margin: by what factor drafting must beat not drafting.

    Returns:
        The depth of every row, 0 for none; and the expected tokens per second.
    """
    seconds = level * target[nodes] + spent
    rate = tokens / seconds
    best, best_count = rate * margin, 0
    calls = {rows: call(rows) for rows in {1, len(gains)}}
    cheapest = min(own[0] for own in calls.values())
    if len(gains) > 1 and not might_pay(gains, tokens=tokens, rate=best, seconds=seconds, cheapest=cheapest):
        return [0] * len(gains), rate
    drafting = sum(1 for own in gains if own)
    if drafting not in calls:
        calls[drafting] = call(drafting)
    deep, best_of_all = _best_depth(gains, tokens, nodes, width, target, calls[drafting], level, spent)
    if len(gains) == 1:
        return ([deep], best_of_all) if best_of_all > best else ([0], rate)
    order = sorted(((gain, row) for row, own in enumerate(gains) for gain in own[:deep]), reverse=True)
    depths = [0] * len(gains)
    rows = deepest = 0
    held = nodes + 0.5
    cost, table = spent, calls[1]
    for count, (gain, row) in enumerate(order, start=1):
        tokens += gain
        depth = depths[row] = depths[row] + 1
        held += width[depth - 1]
        if depth == 1 or depth > deepest:
            if depth == 1:
                rows += 1
                if rows not in calls:
                    calls[rows] = call(rows)
                table = calls[rows]
            deepest = max(deepest, depth)
            cost = spent + table[deepest - 1]
        reached = tokens / (level * target[int(held)] + cost)
        if reached > best:
            best, best_count = reached, count
    if not best_count:
        return [0] * len(gains), rate
    if best_count < len(order):
        depths = [0] * len(gains)
        for _, row in order[:best_count]:
            depths[row] += 1
    return depths, best


def might_pay(gains: Sequence[Sequence[float]], *, tokens: float, rate: float, seconds: float, cheapest: float) -> bool:
    """Whether these drafts would beat a rate if all of them together cost no more than the shortest.

    Args:
        gains: as for `allocate`.
        tokens: what the step is expected to bring without them.
        rate: tokens per second to beat.
        seconds: of the step without them.
        cheapest: of the shortest proposal.
    """
    return tokens + sum(map(sum, gains)) > rate * (seconds + cheapest)


def _best_depth(
    gains: Sequence[Sequence[float]],
    tokens: float,
    nodes: int,
    width: Sequence[float],
    target: Sequence[float],
    calls: Sequence[float],
    level: float,
    spent: float,
) -> tuple[int, float]:
    """The depth that is best where every row drafts as deep, and the tokens per second that it brings."""
    best, best_depth = 0.0, 1
    held = nodes + 0.5
    for depth in range(max(map(len, gains), default=0)):
        if len(gains) == 1:
            tokens += gains[0][depth]
            held += width[depth]
        else:
            level_gains = [own[depth] for own in gains if len(own) > depth]
            tokens += sum(level_gains)
            held += len(level_gains) * width[depth]
        rate = tokens / (level * target[int(held)] + spent + calls[depth])
        if rate > best:
            best, best_depth = rate, depth + 1
    return best_depth, best
