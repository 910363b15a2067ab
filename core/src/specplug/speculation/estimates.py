"""What the automatic budget knows of one speculator, and of one row in it."""

from __future__ import annotations

import itertools
import operator

import attrs

from specplug.plugins.registry import RegisteredSpeculator
from specplug.speculation.acceptance import EngineAcceptance, RowAcceptance
from specplug.speculation.asked import Asked
from specplug.speculation.curve import CostCurve
from specplug.speculation.draft import Draft

_FILL_FORGETS = 0.9
_FEED_FORGETS = 0.8
_FIRST_DEPTH = 3
_GOING_FORGETS, _GOING_AT_FIRST = 0.97, 0.8
_LONGEST_COMPARED, _LONGEST_DRAFTED = 8, 32


@attrs.define(eq=False)
class RowEstimate:
    """One row as one speculator sees it.

    Attributes:
        acceptance: of its drafts.
        depth: the budget that was found best when it was last looked for.
        settled_at: the step in which that was; -1 when it must be looked for again.
        patience: of how many more drafts may be learned before it is looked for again; fewer where little is known.
        probes: whether its last budget was only to see whether drafts would be accepted by now.
        misses: probes in a row that were not accepted.
        wake_at: the step from which on it may be probed again.
        guess: (tokens it had, candidates for the next one) of a proposal that is compared with the text and not verified.
        draft: what is being verified.
        predicted: accepted nodes that the draft's scores promise.
        is_blind: whether the speculator was not shown a part of the text; see `following`.
        stops: whether its last draft was one that may stop where it is unsure.
    """

    acceptance: RowAcceptance = attrs.field(factory=RowAcceptance)
    depth: int = 0
    settled_at: int = -1
    patience: int = 0
    probes: bool = False
    misses: int = 0
    wake_at: int = 0
    guess: tuple[int, frozenset[int]] | None = None
    draft: Draft | None = None
    predicted: float = 0.0
    is_blind: bool = False
    stops: bool = False


@attrs.define(eq=False)
class LinkEstimate:
    """One speculator of the chain.

    Attributes:
        speculator: whose.
        is_auto: whether core chooses its budgets.
        depth: the deepest node.
        width: nodes per level of depth.
        acceptance: of all rows but those that it is blind to.
        blind_acceptance: of those.
        asks: rows → seconds of a proposal as a function of its depth.
        feed: seconds of taking in one token of a gap.
        fill: the share of rows that are given a draft when they are asked for one.
        deepest: the deepest draft that was timed.
        least_chance: what it is told of it, see `Budget`; `least_sum`: the same.
        nodes_at: how many nodes a draft is expected to have at depth 1, 2, …, if it may be so deep.
        going: how likely a chain of 1, 2, … tokens is to go on, if it may; empty while none was seen that could stop.
        levels: how likely any of a proposal's chains is to.
        samples: whether it reported distributions: then a mere comparison with the text would count too little.
        predicted: accepted nodes that scores promised, lately; `accepted`: those that came.
        settled_at: the step in which the budgets of its rows were last divided.
        is_close: whether drafts might have paid then, had they cost no more than the least.
        retired: whether it is not asked any more.
    """

    speculator: RegisteredSpeculator
    is_auto: bool
    depth: int
    width: float
    acceptance: EngineAcceptance
    blind_acceptance: EngineAcceptance
    asks: dict[int, CostCurve] = attrs.field(factory=dict)
    feed: float = 0.0
    fill: float = 1.0
    deepest: int = 0
    least_chance: float = 0.0
    least_sum: float = 0.0
    nodes_at: list[float] = attrs.field(default=attrs.Factory(lambda self: [self.width] * self.depth, takes_self=True))
    going: list[float] = attrs.field(factory=list)
    levels: list[float] = attrs.field(factory=list)
    samples: bool = False
    predicted: float = 2.0
    accepted: float = 2.0
    settled_at: int = -1
    is_close: bool = True
    retired: bool = False

    @classmethod
    def of(cls, speculator: RegisteredSpeculator) -> LinkEstimate:
        """Nothing known yet."""
        traits, most = speculator.traits, speculator.config.num_speculative_tokens
        depth = traits.max_depth or most
        width = max(1.0, (traits.max_nodes or depth) / depth)
        return cls(
            speculator, speculator.config.is_auto, depth, width, EngineAcceptance(depth), EngineAcceptance(depth)
        )

    @property
    def token_only(self) -> bool:
        """Whether it keeps no state that a gap costs."""
        return self.speculator.traits.token_only

    @property
    def compares(self) -> bool:
        """Whether its guesses can be judged by the text that came, without verifying them."""
        return self.token_only and not self.samples

    @property
    def depth_to_try(self) -> int:
        """The deepest budget by now: one that nobody has timed may cost too much to be tried at once."""
        return self.depth if self.token_only else min(self.depth, max(_FIRST_DEPTH, 2 * self.deepest))

    def ask_seconds(self, rows: int, depth: int) -> float:
        """What a proposal for so many rows, so deep, is expected to take; 0 if nothing is known."""
        curve = self._asking(rows)
        return 0.0 if curve is None else curve.seconds(depth)

    def ask_table(self, rows: int) -> list[float]:
        """What a proposal for so many rows is expected to take: 1 deep, 2 deep, … as deep as any, if it goes on so far."""
        curve = self._asking(rows)
        if curve is None:
            return [0.0] * self.depth
        table = curve.table(1, self.depth + 1)
        if not self.going:
            return table
        before = expected = table[0]
        reach = 1.0
        for index, goes_on in enumerate(self.levels, start=1):
            reach *= goes_on
            expected += reach * (table[index] - before)
            before, table[index] = table[index], expected
        return table

    def level_seconds(self, rows: int, depth: int) -> float:
        """What each level behind the first takes of a proposal that goes on so far."""
        return (self.ask_seconds(rows, depth) - self.ask_seconds(rows, 1)) / (depth - 1)

    def _asking(self, rows: int) -> CostCurve | None:
        curve = self.asks.get(rows_class(rows))
        if curve is None and self.asks:
            curve = self.asks[min(self.asks, key=lambda known: abs(known - rows))]
        return curve

    def observe_ask(self, rows: int, depth: int, seconds: float) -> None:
        """Takes in the time of a proposal."""
        key = rows_class(rows)
        if key not in self.asks:
            self.asks[key] = CostCurve(proportional=not self.token_only)
        self.asks[key].observe(depth, seconds)
        self.deepest = max(self.deepest, depth)

    def observe_proposal(self, asked: Asked, seconds: float) -> float:
        """Takes in what asking took; returns what of it was drafting: catching up serves later steps too."""
        rows = len(asked.depths)
        if not asked.fed:
            if rows:
                self.observe_ask(rows, asked.deepest, seconds)
            return seconds
        drafting = min(self.ask_seconds(rows, asked.deepest) if rows else 0.0, seconds)
        if self.asks or not rows:
            self.observe_feed(asked.fed, seconds - drafting)
        return drafting

    def observe_length(self, length: int, most: int) -> None:
        """Takes in how long a chain became, of a speculator that was seen to stop where it is unsure."""
        if not self.going:
            self.going = [_GOING_AT_FIRST] * (self.depth - 1)
            self.levels = list(self.going)
        _learn_length(self.going, length, most)
        self.nodes_at = [1.0, *itertools.accumulate(self.going, operator.mul)]

    def observe_deepest(self, deepest: int, most: int) -> None:
        """Takes in how long the longest of a proposal's chains became."""
        _learn_length(self.levels, deepest, most)

    def gains(self, row: RowEstimate, depth: int, least: float) -> list[float]:
        """The chance that each node of a draft for a row is accepted; see `RowAcceptance.gains`."""
        return row.acceptance.gains(self.blind_acceptance if row.is_blind else self.acceptance, depth, least)

    def learn(self, row: RowEstimate, count: int, *, rejected: bool, step: int, stopped: bool = False) -> None:
        """Takes in what became of a draft, or a guess: nodes accepted, and whether the next was rejected, or not drafted."""
        row.patience -= 1
        acceptance = self.blind_acceptance if row.is_blind else self.acceptance
        if acceptance.record(row.acceptance, count, rejected=rejected, stopped=stopped):
            row.settled_at = -1
        if row.probes:
            row.misses = 0 if count else row.misses + 1
            row.wake_at = step + (0 if count else self.rest(row.misses))
            row.settled_at = -1 if count else row.settled_at

    def rest(self, misses: int) -> int:
        """Steps until a row is probed again after so many failed probes in a row."""
        return min(1 << min(misses, 16), _LONGEST_COMPARED if self.token_only else _LONGEST_DRAFTED)

    def observe_feed(self, tokens: int, seconds: float) -> None:
        """Takes in the time of catching up with a gap."""
        each = max(seconds, 0.0) / tokens
        self.feed = (
            each if not self.feed else _FEED_FORGETS * self.feed + (1 - _FEED_FORGETS) * min(each, 3 * self.feed)
        )

    def observe_fill(self, filled: bool) -> None:
        """Takes in whether a row that was asked for got a draft."""
        self.fill = _FILL_FORGETS * self.fill + (1 - _FILL_FORGETS) * filled

    @property
    def calibration(self) -> float:
        """By how much scores promise too little (above 1) or too much."""
        return min(max(self.accepted / self.predicted, 0.2), 3.0)


def _learn_length(chances: list[float], length: int, most: int) -> None:
    for index in range(min(length, most - 1)):
        chances[index] += (1.0 - _GOING_FORGETS) * ((index + 1 < length) - chances[index])


def rows_class(rows: int) -> int:
    """Numbers of rows whose timings are kept together, named by the largest of them."""
    if rows <= 4:
        return rows
    step = 1 << ((rows - 1).bit_length() - 2)
    return -(-rows // step) * step
