"""What the adaptive policy knows of one speculator."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

from specplug.contract.types import Budget
from specplug.plugins.registry import RegisteredSpeculator
from specplug.speculation.adaptive.acceptance import AcceptanceModel
from specplug.speculation.adaptive.catch_up import CatchUpCost
from specplug.speculation.adaptive.cost_model import CostCurve, CostModel
from specplug.speculation.adaptive.row_estimate import RowEstimate, VerifiedDraft
from specplug.speculation.adaptive.settings import AdaptiveSettings
from specplug.speculation.draft import Draft
from specplug.speculation.draft_length import ProposeCall
from specplug.speculation.row import Row


class SpeculatorEstimate:
    """One speculator of the chain.

    Attributes:
        speculator: whose.
        settings: what is assumed, and how fast it learns.
        is_auto: whether the policy chooses its draft lengths.
        depth: the deepest node.
        width: nodes per level of depth.
        rows: request number → what is known of the row.
        acceptance: of all rows but those that it is blind to.
        blind_acceptance: of those.
        costs: rows → seconds of a proposal over its depth.
        catch_up: seconds of catching up.
        fill: the share of rows that are given a draft when they are asked for one.
        deepest: the deepest draft that was timed.
        min_probability: what it is told of it, see `Budget`; `min_surplus`: the same.
        continuation: the probability that a chain of 1, 2, … tokens is extended, if it may; empty while none was seen that
            stopped.
        level_continuation: the probability that any of a proposal's chains is.
        samples: whether it reported distributions: then a mere comparison with the text would count too little.
        predicted: accepted nodes that scores promised, lately; `accepted`: those that came.
        planned_at: the step in which the depths of its rows were last chosen.
        planned_until: that in which they are again.
        called_at: the step in which it was last asked for drafts.
        streak: for how many steps in a row it was then.
        warm_at: the last step in which it was asked after others in a row: what is done now and then finds cold caches.
        gain: by what factor those depths were expected to beat no drafts.
        is_close: whether drafts might have paid then, had they cost no more than the least.
        is_retired: whether it is not asked any more.
    """

    def __init__(self, speculator: RegisteredSpeculator, settings: AdaptiveSettings) -> None:
        traits, most = speculator.traits, speculator.config.num_speculative_tokens
        self.speculator = speculator
        self.settings = settings
        self.is_auto = speculator.config.is_auto
        self.depth = depth = traits.max_depth or most
        self.width = max(1.0, (traits.max_nodes or depth) / depth)
        self.rows: dict[int, RowEstimate] = {}
        self.acceptance = AcceptanceModel(depth, settings)
        self.blind_acceptance = AcceptanceModel(depth, settings)
        self.costs = CostModel(settings, lambda: CostCurve(settings, proportional=not traits.token_only))
        self.catch_up = CatchUpCost(settings)
        self.fill = 1.0
        self.deepest = 0
        self.min_probability = self.min_surplus = 0.0
        self.continuation: list[float] = []
        self.level_continuation: list[float] = []
        self.samples = False
        self.predicted = self.accepted = settings.first_scores
        self.planned_at = self.called_at = -1
        self.planned_until = self.streak = 0
        self.warm_at = -settings.warm_lasts
        self.gain = 1.0
        self.is_close = True
        self.is_retired = False

    def row(self, request: Row) -> RowEstimate:
        """What is known of a row."""
        row = self.rows.get(request.number)
        if row is None:
            row = self.rows[request.number] = RowEstimate()
        return row

    # ---- the speculator ------------------------------------------------------------------------------------------

    @property
    def token_only(self) -> bool:
        """Whether it keeps no state that a gap costs."""
        return self.speculator.traits.token_only

    @property
    def needs_states(self) -> bool:
        """Whether it reads the target's states."""
        return self.speculator.traits.needs_states

    @property
    def compares(self) -> bool:
        """Whether its guesses can be judged by the text that came, without verifying them."""
        return self.token_only and not self.samples

    @property
    def depth_to_try(self) -> int:
        """The deepest draft by now: one that nobody has timed may cost too much to be tried at once."""
        return self.depth if self.token_only else min(self.depth, max(self.settings.first_depth, 2 * self.deepest))

    def budget(self, depth: int) -> Budget:
        """So deep a draft, with as many nodes as the speculator's trees have."""
        return Budget(math.ceil(depth * self.width), depth, self.min_probability, self.min_surplus)

    # ---- costs ---------------------------------------------------------------------------------------------------

    @property
    def nodes_at(self) -> list[float]:
        """How many nodes a draft is expected to have at depth 1, 2, …, if it may be so deep."""
        if self.continuation:
            return [1.0, *itertools.accumulate(self.continuation, operator.mul)]
        return [self.width] * self.depth

    def seconds(self, rows: int, depth: int) -> float:
        """What a proposal for so many rows, so deep, is expected to take; 0 if nothing is known."""
        curve = self.costs.of(rows)
        return 0.0 if curve is None else curve.seconds(depth)

    def seconds_by_depth(self, rows: int) -> list[float]:
        """What a proposal for so many rows is expected to take if it may be 1, 2, … deep."""
        curve = self.costs.of(rows)
        if curve is None:
            return [0.0] * self.depth
        table = curve.table(1, self.depth + 1)
        if not self.continuation:
            return table
        before = expected = table[0]
        reach = 1.0
        for index, continues in enumerate(self.level_continuation, start=1):
            reach *= continues
            expected += reach * (table[index] - before)
            before, table[index] = table[index], expected
        return table

    def level_seconds(self, rows: int, depth: int) -> float:
        """What each level after the first takes of a proposal that reaches a depth."""
        return (self.seconds(rows, depth) - self.seconds(rows, 1)) / (depth - 1)

    @property
    def is_warm(self) -> bool:
        """Whether it has been asked for some steps in a row."""
        return self.streak > self.settings.warm_after

    def was_warm(self, step: int) -> bool:
        """Whether what it costs when it is asked in every step was measured lately."""
        return step - self.warm_at < self.settings.warm_lasts

    def observe_call(self, call: ProposeCall, seconds: float, step: int) -> float:
        """Takes in what a call took; returns what of it was drafting: catching up serves later steps too."""
        rows = len(call.depths)
        if rows:
            self.streak = self.streak + 1 if self.called_at == step - 1 else 1
            self.called_at = step
            if self.is_warm:
                self.warm_at = step
        if not call.catch_up:
            if rows and (self.is_warm or not self.was_warm(step)):
                self.costs.observe(rows, call.deepest, seconds)
                self.deepest = max(self.deepest, call.deepest)
            return seconds
        drafting = min(self.seconds(rows, call.deepest) if rows else 0.0, seconds)
        if self.costs or not rows:
            self.catch_up.begin(call.catch_up, seconds - drafting)
            if not self.settings.runs_ahead:
                self.catch_up.settle(0.0)
        return drafting

    # ---- drafts --------------------------------------------------------------------------------------------------

    def observe_drafts(self, drafts: Sequence[Draft], refused: int, call: ProposeCall) -> None:
        """Takes in what a proposal brought.

        Args:
            drafts: of the rows that got one.
            refused: rows that were to draft, and got none.
            call: what was asked for.
        """
        if refused or self.fill < 1.0:
            self._observe_fill(len(drafts), refused)
        for draft in drafts:
            self.samples = self.samples or draft.probs is not None
            if draft.parents is None and (self.continuation or draft.stopped):
                if not self.continuation:
                    self.continuation = [self.settings.first_continuation] * (self.depth - 1)
                    self.level_continuation = list(self.continuation)
                self._observe_length(self.continuation, len(draft), draft.allowed)
        if self.continuation:
            self._observe_length(self.level_continuation, call.deepest, call.allowed)

    def _observe_fill(self, given: int, refused: int) -> None:
        if rows := given + refused:
            keeps = self.settings.fill_memory**rows
            self.fill = keeps * self.fill + (1.0 - keeps) * given / rows

    def _observe_length(self, continuation: list[float], length: int, most: int) -> None:
        rate = 1.0 - self.settings.score_memory
        for index in range(min(length, most - 1)):
            continuation[index] += rate * ((index + 1 < length) - continuation[index])

    def gains(self, row: RowEstimate, depth: int, least: float, position: int) -> list[float]:
        """The probability that each node of a draft for a row is accepted; see `RowAcceptance.gains`."""
        return row.acceptance.gains(self._acceptance_of(row), depth, least, position)

    def evidence(self, row: RowEstimate, others: float) -> float:
        """As how many drafts counts what a row is judged by: its own, and such a share of what is known of others."""
        model, own = self._acceptance_of(row), row.acceptance
        return own.first_reached + others * own.likeness * min(model.trust, model.drafts)

    def learn(
        self, row: RowEstimate, accepted: int, *, rejected: bool, step: int, position: int, stopped: bool = False
    ) -> None:
        """Takes in what became of a draft, or a guess.

        Args:
            row: whose it was.
            accepted: nodes accepted.
            rejected: whether the next was rejected.
            step: the step's number.
            position: the output position that the first node was for.
            stopped: whether the next was not drafted, though it might have been.
        """
        model = self._acceptance_of(row)
        if model.record(row.acceptance, accepted, rejected=rejected, stopped=stopped, position=position):
            row.planned_at = -1
        if row.is_probe:
            row.misses = 0 if accepted else row.misses + 1
            row.wake_at = step + (0 if accepted else self.pause(row.misses))
            row.planned_at = -1 if accepted else row.planned_at

    def learn_draft(self, verified: VerifiedDraft) -> None:
        """Takes in what became of a draft."""
        draft, nodes, accepted = verified.draft, verified.outcome.num_nodes, verified.outcome.accepted
        count = len(accepted)
        rejected = count < nodes
        stopped = not rejected and draft.stopped and nodes == draft.proposed
        if rejected and draft.parents is not None:
            rejected = (accepted[-1] if count else -1) in draft.parents
        if draft.scores is not None:
            keeps = self.settings.score_memory
            self.predicted = keeps * self.predicted + sum(math.exp(min(score, 0.0)) for score in draft.scores)
            self.accepted = keeps * self.accepted + count
        step, position = verified.step, verified.position
        self.learn(verified.row, count, rejected=rejected, step=step, position=position, stopped=stopped)

    def pause(self, misses: int) -> int:
        """Steps until a row is probed again after so many failed probes in a row."""
        longest = self.settings.longest_pause_compared if self.token_only else self.settings.longest_pause
        return min(1 << min(misses, 16), longest)

    @property
    def calibration(self) -> float:
        """By how much scores promise too little (above 1) or too much."""
        return min(max(self.accepted / self.predicted, 0.2), 3.0)

    def _acceptance_of(self, row: RowEstimate) -> AcceptanceModel:
        return self.blind_acceptance if row.is_blind else self.acceptance


def deepest_useful(estimate: SpeculatorEstimate, request: Row) -> int:
    """The deepest draft that a row can use."""
    depth = min(estimate.depth_to_try, tokens_left(request) - 1)
    cap = request.params.num_speculative_tokens
    return depth if cap is None else min(depth, math.ceil(cap / estimate.width))


def tokens_left(request: Row) -> int:
    """Tokens that a row may still generate."""
    assert request.params.max_tokens is not None
    return request.params.max_tokens - request.num_output_tokens
