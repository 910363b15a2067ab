"""What the automatic budget knows of one speculator, and of one row in it."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import attrs

from specplug.plugins.registry import RegisteredSpeculator
from specplug.request import Request
from specplug.speculation.acceptance import EngineAcceptance, RowAcceptance
from specplug.speculation.asked import Asked
from specplug.speculation.curve import CostCurve
from specplug.speculation.draft import Draft
from specplug.speculation.row_costs import RowCosts

_FILL_FORGETS = 0.9
_FEED_FORGETS = 0.8
_SCORES_FORGET = 0.97
_FIRST_DEPTH = 3
_GOING_FORGETS, _GOING_AT_FIRST = 0.97, 0.8
_WARM_AFTER, _WARM_LASTS = 2, 512
_LONGEST_COMPARED, _LONGEST_DRAFTED = 8, 32


@attrs.define(eq=False)
class RowEstimate:
    """One row as one speculator sees it.

    Attributes:
        acceptance: of its drafts.
        depth: the budget that was found best when it was last looked for.
        settled_at: the step in which that was; -1 when it must be looked for again.
        probes: whether its last budget was only to see whether drafts would be accepted by now.
        misses: probes in a row that were not accepted.
        wake_at: the step from which on it may be probed again; -1 before that was decided.
        is_owed: whether the speculator was shown its prompt, and was not asked for a draft since.
        guess: (tokens it had, candidates for the next one) of a proposal that is compared with the text and not verified.
        draft: what is being verified.
        is_blind: whether the speculator was not shown a part of the text; see `following`.
        stops: whether its last draft was one that may stop where it is unsure.
    """

    acceptance: RowAcceptance = attrs.field(factory=RowAcceptance)
    depth: int = 0
    settled_at: int = -1
    probes: bool = False
    misses: int = 0
    wake_at: int = -1
    is_owed: bool = False
    guess: tuple[int, frozenset[int]] | None = None
    draft: Draft | None = None
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
        going: how likely a chain of 1, 2, … tokens is to go on, if it may; empty while none was seen that could stop.
        levels: how likely any of a proposal's chains is to.
        samples: whether it reported distributions: then a mere comparison with the text would count too little.
        predicted: accepted nodes that scores promised, lately; `accepted`: those that came.
        settled_at: the step in which the depths of its rows were last looked for.
        settled_until: that in which they are again.
        asked_at: the step in which it was last asked for drafts.
        streak: for how many steps on end it was then.
        warm_at: the last step in which it was asked after others in a row: what is done now and then finds cold caches.
        gain: by what factor those depths were expected to beat no drafts.
        is_close: whether drafts might have paid then, had they cost no more than the least.
        retired: whether it is not asked any more.
    """

    speculator: RegisteredSpeculator
    is_auto: bool
    depth: int
    width: float
    acceptance: EngineAcceptance
    blind_acceptance: EngineAcceptance
    asks: RowCosts
    feed: float = 0.0
    fill: float = 1.0
    deepest: int = 0
    least_chance: float = 0.0
    least_sum: float = 0.0
    going: list[float] = attrs.field(factory=list)
    levels: list[float] = attrs.field(factory=list)
    samples: bool = False
    predicted: float = 2.0
    accepted: float = 2.0
    settled_at: int = -1
    settled_until: int = 0
    asked_at: int = -1
    streak: int = 0
    warm_at: int = -_WARM_LASTS
    gain: float = 1.0
    is_close: bool = True
    retired: bool = False

    @classmethod
    def of(cls, speculator: RegisteredSpeculator) -> LinkEstimate:
        """Nothing known yet."""
        traits, most = speculator.traits, speculator.config.num_speculative_tokens
        depth = traits.max_depth or most
        width = max(1.0, (traits.max_nodes or depth) / depth)
        return cls(
            speculator,
            speculator.config.is_auto,
            depth,
            width,
            EngineAcceptance(depth),
            EngineAcceptance(depth),
            RowCosts(lambda: CostCurve(proportional=not traits.token_only)),
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
    def nodes_at(self) -> list[float]:
        """How many nodes a draft is expected to have at depth 1, 2, …, if it may be so deep."""
        return [1.0, *itertools.accumulate(self.going, operator.mul)] if self.going else [self.width] * self.depth

    @property
    def depth_to_try(self) -> int:
        """The deepest budget by now: one that nobody has timed may cost too much to be tried at once."""
        return self.depth if self.token_only else min(self.depth, max(_FIRST_DEPTH, 2 * self.deepest))

    def ask_seconds(self, rows: int, depth: int) -> float:
        """What a proposal for so many rows, so deep, is expected to take; 0 if nothing is known."""
        curve = self.asks.of(rows)
        return 0.0 if curve is None else curve.seconds(depth)

    def ask_table(self, rows: int) -> list[float]:
        """What a proposal for so many rows is expected to take: 1 deep, 2 deep, … as deep as any, if it goes on so far."""
        curve = self.asks.of(rows)
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

    @property
    def is_warm(self) -> bool:
        """Whether it has been asked for some steps on end."""
        return self.streak > _WARM_AFTER

    def was_warm(self, step: int) -> bool:
        """Whether what it costs when it is asked in every step was measured lately."""
        return step - self.warm_at < _WARM_LASTS

    def _note_asked(self, step: int) -> None:
        """It is asked for drafts."""
        self.streak = self.streak + 1 if self.asked_at == step - 1 else 1
        self.asked_at = step
        if self.is_warm:
            self.warm_at = step

    def observe_ask(self, rows: int, depth: int, seconds: float) -> None:
        """Takes in the time of a proposal."""
        self.asks.observe(rows, depth, seconds)
        self.deepest = max(self.deepest, depth)

    def observe_proposal(self, asked: Asked, seconds: float, step: int) -> float:
        """Takes in what asking took; returns what of it was drafting: catching up serves later steps too."""
        rows = len(asked.depths)
        if rows:
            self._note_asked(step)
        if not asked.fed:
            if rows and (self.is_warm or not self.was_warm(step)):
                self.observe_ask(rows, asked.deepest, seconds)
            return seconds
        drafting = min(self.ask_seconds(rows, asked.deepest) if rows else 0.0, seconds)
        if self.asks or not rows:
            self.observe_feed(asked.fed, seconds - drafting)
        return drafting

    def observe_drafts(self, drafts: Sequence[Draft], refused: int, asked: Asked) -> None:
        """Takes in what a proposal brought.

        Args:
            drafts: of the rows that got one.
            refused: rows that were to draft, and got none.
            asked: what was asked for.
        """
        if refused or self.fill < 1.0:
            self._observe_fill(len(drafts), refused)
        for draft in drafts:
            self.samples = self.samples or draft.probs is not None
            if draft.parents is None and (self.going or draft.stopped):
                if not self.going:
                    self.going = [_GOING_AT_FIRST] * (self.depth - 1)
                    self.levels = list(self.going)
                _learn_length(self.going, len(draft), draft.allowed)
        if self.going:
            _learn_length(self.levels, asked.deepest, asked.allowed)

    def drafts_behind(self, row: RowEstimate, others: float) -> float:
        """As how many drafts counts what a row is judged by: its own, and such a share of what is known of others."""
        acceptance = self.blind_acceptance if row.is_blind else self.acceptance
        return row.acceptance.first_reached + others * row.acceptance.likeness * min(
            acceptance.trust, acceptance.drafts
        )

    def gains(self, row: RowEstimate, depth: int, least: float, position: int) -> list[float]:
        """The chance that each node of a draft for a row is accepted; see `RowAcceptance.gains`."""
        return row.acceptance.gains(self.blind_acceptance if row.is_blind else self.acceptance, depth, least, position)

    def learn(
        self, row: RowEstimate, count: int, *, rejected: bool, step: int, position: int, stopped: bool = False
    ) -> None:
        """Takes in what became of a draft, or a guess.

        Args:
            row: whose it was.
            count: nodes accepted.
            rejected: whether the next was rejected.
            step: the step's number.
            position: the place in the output that the first node was for.
            stopped: whether the next was not drafted, though it might have been.
        """
        acceptance = self.blind_acceptance if row.is_blind else self.acceptance
        if acceptance.record(row.acceptance, count, rejected=rejected, stopped=stopped, position=position):
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

    def _observe_fill(self, given: int, refused: int) -> None:
        if rows := given + refused:
            kept = _FILL_FORGETS**rows
            self.fill = kept * self.fill + (1.0 - kept) * given / rows

    def observe_scores(self, draft: Draft, accepted: int) -> None:
        """Takes in how many nodes of a scored draft were accepted."""
        if draft.scores is not None:
            self.predicted = _SCORES_FORGET * self.predicted + sum(math.exp(min(s, 0.0)) for s in draft.scores)
            self.accepted = _SCORES_FORGET * self.accepted + accepted

    @property
    def calibration(self) -> float:
        """By how much scores promise too little (above 1) or too much."""
        return min(max(self.accepted / self.predicted, 0.2), 3.0)


def estimate_of(request: Request, index: int, speculators: int) -> RowEstimate:
    """What is known of a row as one of so many speculators sees it."""
    if not request.estimates:
        request.estimates = [RowEstimate() for _ in range(speculators)]
    return request.estimates[index]


def _learn_length(chances: list[float], length: int, most: int) -> None:
    for index in range(min(length, most - 1)):
        chances[index] += (1.0 - _GOING_FORGETS) * ((index + 1 < length) - chances[index])
