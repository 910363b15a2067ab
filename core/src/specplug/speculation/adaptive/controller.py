"""Draft lengths that bring the most tokens per second of what is measured: `num_speculative_tokens: "auto"`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from specplug.plugins.registry import RegisteredSpeculator
from specplug.speculation.adaptive.cost_model import target_costs
from specplug.speculation.adaptive.estimates import SpeculatorEstimate, deepest_useful, tokens_left
from specplug.speculation.adaptive.exploration import ExplorationBudget, vary
from specplug.speculation.adaptive.goodput import StepForecast
from specplug.speculation.adaptive.guess import Guess
from specplug.speculation.adaptive.planner import Called, HeldPlan, choose_depths, is_planned, keep_what_pays
from specplug.speculation.adaptive.row_estimate import Candidate, RowEstimate, VerifiedDraft
from specplug.speculation.adaptive.settings import AdaptiveSettings
from specplug.speculation.adaptive.sleeping import (
    Resting,
    choose_probes,
    has_lost_states,
    is_about_to_lose_states,
    is_unseen,
    missed_tokens,
    shows_prompt,
)
from specplug.speculation.draft import Draft
from specplug.speculation.draft_length import DraftLengthPolicy, FixedDraftLength, Length, ProposeCall
from specplug.speculation.row import Row

_FEWEST_TIMINGS = 8  # before the expected seconds of a plain step are told to others


class AdaptiveDraftLength(DraftLengthPolicy):
    """Chooses every row's draft length, zero and sleep included, from timings and acceptance. Outputs do not depend on it.

    A row drafts while that is expected to raise the goodput of the batch, and sleeps otherwise. A sleeping row is *probed* now
    and then, ever more rarely while probes fail, within a small share of the time (`ExplorationBudget`): a speculator that
    sees tokens alone is asked for a guess, which is compared with the text and never verified; any other drafts one level.

    Attributes:
        settings: what is assumed, and how fast it learns.
        estimates: what is known of the speculators, in the order they are asked.
        targets: rows → seconds of a target step over its draft nodes.
        budget: what exploration may cost.
        step: the number of the step.
        num_looks: how often depths were chosen anew.
    """

    def __init__(self, speculators: Sequence[RegisteredSpeculator], settings: AdaptiveSettings | None = None) -> None:
        self.settings = settings = AdaptiveSettings() if settings is None else settings
        self.estimates = [SpeculatorEstimate(speculator, settings) for speculator in speculators]
        self.targets = target_costs(settings)
        self.budget = ExplorationBudget(settings)
        self.step = 0
        self.num_looks = 0
        self._of = dict(zip(speculators, self.estimates, strict=True))
        self._fixed = FixedDraftLength()
        self._forecast = StepForecast(0, self.targets, settings)
        self._resting = Resting(settings)
        self._called: list[Called] = []
        self._joining = 1  # rows of the step that the speculator has not seen
        self._planned: set[int] = set()  # numbers of the rows that lengths were chosen for last
        self._held: dict[SpeculatorEstimate, HeldPlan] = {}
        self._drafts: dict[int, Draft] = {}  # request number → what is being verified
        self._verified: list[tuple[SpeculatorEstimate, VerifiedDraft]] = []  # and not learned from yet
        self._timings: list[tuple[int, float, bool]] = []  # of skipped steps: rows, seconds, whether all decoded

    # ---- rows and speculators that come and go --------------------------------------------------------------------

    def retire(self, speculator: RegisteredSpeculator) -> None:
        """See `DraftLengthPolicy.retire`."""
        self._of[speculator].is_retired = True

    def restart(self, request: Row) -> None:
        """See `DraftLengthPolicy.restart`. The row comes back as a new one."""
        self._held.clear()
        self.finish(request)

    def finish(self, request: Row) -> None:
        """See `DraftLengthPolicy.finish`."""
        for estimate in self.estimates:
            estimate.rows.pop(request.number, None)

    def fork(self, parent: Row, child: Row) -> None:
        """See `DraftLengthPolicy.fork`."""
        for estimate in self.estimates:
            if parent.number in estimate.rows:
                estimate.row(child).is_blind = estimate.row(parent).is_blind

    def lose_states(self, speculator: RegisteredSpeculator, request: Row) -> None:
        """See `DraftLengthPolicy.lose_states`."""
        self._of[speculator].row(request).is_blind = True

    def plain_seconds(self, num_rows: int) -> float | None:
        """See `DraftLengthPolicy.plain_seconds`."""
        curve = self.targets.of(num_rows)
        return None if curve is None or curve.count < _FEWEST_TIMINGS else curve.seconds(0)

    def keeps_states(self, speculator: RegisteredSpeculator, request: Row) -> bool:
        """See `DraftLengthPolicy.keeps_states`: of a row that is lost to it, hardly."""
        estimate = self._of[speculator]
        return not (estimate.acceptance.is_hopeless and estimate.row(request).is_blind)

    # ---- before the speculators are asked -------------------------------------------------------------------------

    def begin(self, requests: Sequence[Row]) -> bool:
        """See `DraftLengthPolicy.begin`: no speculator is asked while every row sleeps and none is to be woken yet."""
        if self._resting.holds(requests, self.step):
            return False
        for rows, seconds, decoding in self._timings:
            self._time(rows, seconds, decoding)
        self._timings.clear()
        late = min(len(requests) - 1, self.settings.learn_every)
        if self._verified and self.step - self._verified[0][1].step >= late:
            self._learn()
        self._resting.begin()
        self.budget.begin()
        decoding_rows = sum(request.num_pending == 1 for request in requests)
        self._forecast = StepForecast(decoding_rows, self.targets, self.settings)
        return True

    def rests(self, requests: Sequence[Row]) -> bool:
        """See `DraftLengthPolicy.rests`: while it rests it learns nothing from a step but its time."""
        return self._resting.is_resting and self._resting.lasts(requests, self.step + 1)

    def plan(
        self,
        speculator: RegisteredSpeculator,
        requests: Sequence[Row],
        seen: Mapping[int, int],
        has_all_states: Callable[[Row], bool],
    ) -> list[Length]:
        """See `DraftLengthPolicy.plan`."""
        estimate = self._of[speculator]
        self._planned = {request.number for request in requests}
        held = self._held.get(estimate)
        if held is not None and held.holds(requests, self.step):
            self._called = held.called
            self._resting.forbid()
            return held.lengths
        self._held.pop(estimate, None)
        self._learn()
        self._called = []
        lengths: list[Length] = [None] * len(requests)
        candidates: list[Candidate] = []
        self._joining = max(1, sum(request.number not in seen for request in requests))
        for place, request in enumerate(requests):
            gap = missed_tokens(estimate, request.num_computed, seen.get(request.number, 0))
            if request.num_pending > 1:
                if self._shows_prompt(estimate, request, has_begun=request.number in seen):
                    lengths[place] = 0
            elif limit := deepest_useful(estimate, request):
                candidate = Candidate(place, request, estimate.row(request), limit, gap)
                candidates.append(candidate)
                if not estimate.is_auto:
                    lengths[place] = self._fixed.length_of(request, speculator)
                    self._call(candidate, limit)
                elif is_unseen(estimate, candidate, seen) and has_all_states(request):
                    if self._shows_prompt(estimate, request, has_begun=False):
                        lengths[place] = candidate.gap = 0
                        candidate.row.is_owed = True
                elif has_lost_states(estimate, candidate, seen):
                    candidate.row.is_blind = True
        if candidates and estimate.is_auto:
            self._divide(estimate, requests, candidates, lengths)
        return lengths

    def plans_early(self, requests: Sequence[Row]) -> bool:
        """See `DraftLengthPolicy.plans_early`: while rows draft and none has joined, choices may be a step old."""
        return (
            bool(self._called)
            and not any(row.is_probe for _, row, _ in self._called)  # what comes of it decides when the next is due
            and self._planned.issuperset(request.number for request in requests)
            and all(request.num_pending == 1 for request in requests)
        )

    def _divide(
        self,
        estimate: SpeculatorEstimate,
        requests: Sequence[Row],
        candidates: list[Candidate],
        lengths: list[Length],
    ) -> None:
        """Gives a draft to every row that it pays for, and to some others a probe."""
        forecast = self._forecast
        if not is_planned(estimate, candidates, self.step):
            self.num_looks += 1
            later = self.estimates[self.estimates.index(estimate) + 1 :]
            choose_depths(estimate, later, candidates, forecast, self.budget, self.step)
        depths = [min(c.row.depth, c.limit) for c in candidates]
        steps = 0
        if any(depths):
            self._resting.forbid()
            limits = [c.limit for c in candidates]
            depths, steps = vary(self.settings, depths, limits, self.step, forecast.timings, estimate.gain)
        idle = []
        for candidate, depth in zip(candidates, depths, strict=True):
            if depth:
                candidate.row.is_probe, candidate.row.is_owed, candidate.row.guess = False, False, None
                lengths[candidate.place] = estimate.budget(depth)
                self._call(candidate, depth)
            elif not candidate.row.depth:
                idle.append(candidate)
        if idle:
            self._probe(estimate, idle, lengths)
        elif len(candidates) == len(requests):
            until = min(self.step + steps, estimate.planned_until)
            self._held[estimate] = HeldPlan([request.number for request in requests], lengths, self._called, until)

    def _probe(self, estimate: SpeculatorEstimate, idle: list[Candidate], lengths: list[Length]) -> None:
        """Tries some of the rows that sleep."""
        depths = [depth for _, _, depth in self._called]
        chosen, later = choose_probes(estimate, self._forecast, self.budget, idle, depths, self.step)
        self._resting.wake(later, probes=bool(chosen))
        for candidate in chosen:
            row = candidate.row
            row.is_probe, row.is_owed, row.wake_at = True, False, self.step + 1
            lengths[candidate.place] = estimate.budget(1)
            self._called.append((candidate.request, row, 1))
        for candidate in idle:
            if is_about_to_lose_states(estimate, candidate) and lengths[candidate.place] is None:
                advance = self.budget.advance(tokens_left(candidate.request))
                if self.budget.affords(estimate.catch_up.seconds(candidate.gap), advance):
                    lengths[candidate.place] = 0

    # ---- after ----------------------------------------------------------------------------------------------------

    def proposed(self, speculator: RegisteredSpeculator, seconds: float, call: ProposeCall | None) -> None:
        """See `DraftLengthPolicy.proposed`. Guesses that are not to be verified are taken out of `request.draft`."""
        estimate, forecast, resting = self._of[speculator], self._forecast, self._resting
        forecast.spent += seconds if call is None else estimate.observe_call(call, seconds, self.step)
        if call is None:
            if not resting.is_forbidden:
                self.budget.charge(seconds)
            return
        if not resting.is_forbidden:
            self.budget.settle(seconds)
        is_last = estimate is self.estimates[-1]
        drafts: list[Draft] = []
        refused = 0
        for request, row, depth in self._called:
            if request.number not in call.depths:
                continue
            draft = request.draft
            if draft is None:
                if not row.is_probe:
                    refused += 1
                elif not forecast.is_negligible(seconds):
                    row.misses += 1
                    row.wake_at = self.step + estimate.pause(row.misses)
                continue
            drafts.append(draft)
            row.stops = draft.is_scored_chain
            if row.is_probe and estimate.compares and draft.probs is None:
                row.guess = Guess.of(draft, len(request.tokens))
                request.draft = None
                continue
            forecast.nodes += len(draft)
            if not is_last:
                forecast.tokens += sum(estimate.gains(row, depth, 0.0, request.num_output_tokens)[: len(draft)])
        estimate.observe_drafts(drafts, refused, call)

    def trim(self, drafts: Sequence[Draft | None]) -> list[Draft | None]:
        """See `DraftLengthPolicy.trim`: keeps the nodes of scored drafts that are worth verifying."""
        if not self.targets or not any(draft is not None and draft.scores is not None for draft in drafts):
            return list(drafts)
        return keep_what_pays(drafts, self._of, self._forecast)

    def end(self, requests: Sequence[Row]) -> None:
        """See `DraftLengthPolicy.end`. Decides how long rows that all sleep are left alone."""
        self._drafts = {request.number: request.draft for request in requests if request.draft is not None}
        if not self._resting.is_forbidden and not self._resting.probes:
            self._rest(requests)

    def observe(self, requests: Sequence[Row], seconds: float, *, decoding: bool) -> None:
        """See `DraftLengthPolicy.observe`. Some is learned from later, several steps at once: one by one is slow."""
        self.step += 1
        if self._resting.is_resting:
            for estimate in self.estimates:
                if estimate.catch_up.open_call is not None:
                    estimate.catch_up.settle(0.0)
            self._timings.append((len(requests), seconds, decoding))
            return
        nodes, is_typical = 0, True
        for request in requests:
            outcome, draft = request.outcome, self._drafts.get(request.number)
            if outcome is not None and draft is not None and draft.speculator is not None:
                nodes += outcome.num_nodes
                estimate = self._of[draft.speculator]
                position = max(request.num_output_tokens - len(outcome.accepted) - 1, 0)
                verified = VerifiedDraft(estimate.row(request), draft, outcome, self.step, position)
                self._verified.append((estimate, verified))
                is_typical = is_typical and (estimate.is_warm or not estimate.was_warm(self.step))
            for estimate, row in self._rows_of([request]):
                if row.guess is not None:
                    self._compare(request, row, estimate)
        seconds -= self._catch_up_late(len(requests), nodes, seconds if decoding else 0.0)
        self._time(len(requests), seconds, decoding and is_typical, nodes)
        if self._resting.probes:
            self._learn()
            for _, row in self._rows_of(requests):
                self._resting.wake(row.wake_at)
            self._rest(requests)

    # ---- details --------------------------------------------------------------------------------------------------

    def _catch_up_late(self, rows: int, nodes: int, seconds: float) -> float:
        """What of a step's time speculators took to catch up: a call may return before it is computed."""
        late = [estimate for estimate in self.estimates if estimate.catch_up.open_call is not None]
        if not late:
            return 0.0
        curve = self.targets.of(rows)
        surplus = 0.0 if curve is None else max(0.0, seconds - curve.seconds(nodes))
        for estimate in late:
            estimate.catch_up.settle(surplus / len(late))
        return surplus

    def _time(self, rows: int, seconds: float, decoding: bool, nodes: int = 0) -> None:
        """Takes in a step's time."""
        if decoding:
            self.targets.observe(rows, nodes, seconds)
        self.budget.earn(seconds)

    def _learn(self) -> None:
        """Takes in what became of drafts; where that was unlikely, depths are chosen anew at once."""
        verified, self._verified = self._verified, []
        for estimate, draft in verified:
            estimate.learn_draft(draft)
        if any(draft.row.planned_at < 0 for _, draft in verified):
            self._held.clear()
        self.budget.adjust_share(min(estimate.acceptance.hopeless_misses for estimate in self.estimates))

    def _compare(self, request: Row, row: RowEstimate, estimate: SpeculatorEstimate) -> None:
        """Takes in whether a guess that was not verified came true."""
        assert row.guess is not None
        hit, position = row.guess.came_true(request.tokens), row.guess.length - request.num_prompt_tokens
        if hit is not None:
            row.guess = None
            estimate.learn(row, int(hit), rejected=not hit, step=self.step, position=position)

    def _rows_of(self, requests: Sequence[Row]) -> list[tuple[SpeculatorEstimate, RowEstimate]]:
        """What is known of the rows, for every speculator."""
        return [
            (estimate, row)
            for request in requests
            for estimate in self.estimates
            if (row := estimate.rows.get(request.number)) is not None
        ]

    def _rest(self, requests: Sequence[Row]) -> None:
        """Rows rest: where drafts are far from paying longer than where the next choice may decide otherwise."""
        is_close = any(estimate.is_close for estimate in self.estimates if not estimate.is_retired)
        most = self.settings.near_rest if is_close else None
        self._resting.plan(requests, [row for _, row in self._rows_of(requests)], self.step, most)

    def _call(self, candidate: Candidate, depth: int) -> None:
        """Notes that a row drafts."""
        self._called.append((candidate.request, candidate.row, depth))
        self._resting.forbid()

    def _shows_prompt(self, estimate: SpeculatorEstimate, request: Row, *, has_begun: bool) -> bool:
        forecast = self._forecast if self._forecast.rows else StepForecast(1, self.targets, self.settings)
        return shows_prompt(estimate, request, forecast, self.budget, has_begun=has_begun, joining=self._joining)
