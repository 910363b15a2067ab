"""What the automatic budget knows of one speculator, and of one row in it."""

from __future__ import annotations

import attrs

from specplug.plugins.registry import RegisteredSpeculator
from specplug.speculation.acceptance import EngineAcceptance, RowAcceptance
from specplug.speculation.asked import Asked
from specplug.speculation.curve import CostCurve
from specplug.speculation.draft import Draft

_FILL_FORGETS = 0.9
_FEED_FORGETS = 0.8
_FIRST_DEPTH = 3
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


@attrs.define(eq=False)
class LinkEstimate:
    """One speculator of the chain.

    Attributes:
        speculator: whose.
        is_auto: whether core chooses its budgets.
        depth: the deepest node.
        width: nodes per level of depth.
        acceptance: of all rows.
        asks: rows → seconds of a proposal as a function of its depth.
        feed: seconds of taking in one token of a gap.
        fill: the share of rows that are given a draft when they are asked for one.
        deepest: the deepest draft that was timed.
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
    asks: dict[int, CostCurve] = attrs.field(factory=dict)
    feed: float = 0.0
    fill: float = 1.0
    deepest: int = 0
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
        return cls(speculator, speculator.config.is_auto, depth, width, EngineAcceptance(depth))

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
        """What a proposal for so many rows is expected to take: 1 deep, 2 deep, … as deep as any."""
        curve = self._asking(rows)
        return [0.0] * self.depth if curve is None else curve.table(1, self.depth + 1)

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
        if self.asks:
            self.observe_feed(asked.fed, seconds - drafting)
        return drafting

    def learn(self, row: RowEstimate, count: int, *, rejected: bool, step: int) -> None:
        """Takes in what became of a draft of a row, or of a guess: nodes accepted, and whether the next was rejected."""
        row.patience -= 1
        if self.acceptance.record(row.acceptance, count, rejected=rejected):
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


def rows_class(rows: int) -> int:
    """Numbers of rows whose timings are kept together, named by the largest of them."""
    if rows <= 4:
        return rows
    step = 1 << ((rows - 1).bit_length() - 2)
    return -(-rows // step) * step
