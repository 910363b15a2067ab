"""Rows that sleep: whether they are shown the text meanwhile, which are tried again and when, and steps with nothing to do.

The target's states are stored for the last positions of a row alone. A speculator that reads them and was not shown the rest,
a prompt above all, is *blind* to it: it continues with what it has, and its drafts are worse for as long as the text lasts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from specplug.speculation.adaptive.acceptance import RowAcceptance
from specplug.speculation.adaptive.estimates import SpeculatorEstimate, tokens_left
from specplug.speculation.adaptive.exploration import ExplorationBudget
from specplug.speculation.adaptive.goodput import StepForecast
from specplug.speculation.adaptive.row_estimate import Candidate, RowEstimate
from specplug.speculation.adaptive.settings import AdaptiveSettings
from specplug.speculation.draft_length import SHORT_GAP
from specplug.speculation.row import Row
from specplug.speculation.target_states.ring_buffer import WINDOW

_GOLDEN = 0.6180339887
_SHOWN_AT = WINDOW - 8
"""Sleeping rows are shown their states when so many positions are missing: soon the first of them is lost."""


# ---- what a speculator is shown -----------------------------------------------------------------------------------------


def missed_tokens(estimate: SpeculatorEstimate, computed: int, seen: int) -> int:
    """How many tokens of a row a speculator must process: of target states no more than are stored."""
    if estimate.token_only:
        return 0
    return min(computed - seen, WINDOW) if estimate.needs_states else computed - seen


def shows_prompt(
    estimate: SpeculatorEstimate,
    request: Row,
    forecast: StepForecast,
    budget: ExplorationBudget,
    *,
    has_begun: bool,
    joining: int = 1,
) -> bool:
    """Whether a speculator with a state processes a prompt while it is computed: drafts may pay, or to see is cheap.

    Args:
        estimate: the speculator.
        request: the row.
        forecast: the step that is being prepared.
        budget: what is paid from where drafts would not pay by what is known of other rows.
        has_begun: whether it was shown a part of the prompt.
        joining: prompts that are computed in this step, which share the cost of a call.
    """
    if estimate.token_only or request.params.num_speculative_tokens == 0:
        return False
    if has_begun or not estimate.is_auto or not (estimate.costs or estimate.catch_up.is_known):
        return True
    halfway = tokens_left(request) // 2
    gains = RowAcceptance().gains(estimate.acceptance, estimate.depth_to_try, forecast.least_gain, halfway)
    _, rate = forecast.divide(estimate, [gains] * forecast.rows)
    cost = estimate.catch_up.share(request.num_prompt_tokens, joining * request.num_prompt_tokens)
    if budget.is_sound and forecast.repays(cost, tokens_left(request), rate):
        return True
    return budget.affords(cost, budget.advance(tokens_left(request)))


def is_unseen(estimate: SpeculatorEstimate, candidate: Candidate, seen: Mapping[int, int]) -> bool:
    """Whether a speculator was never shown a row: its prompt must be processed now, if it has just been computed."""
    return candidate.row.planned_at < 0 and candidate.request.number not in seen and estimate.needs_states


def has_lost_states(estimate: SpeculatorEstimate, candidate: Candidate, seen: Mapping[int, int]) -> bool:
    """Whether some states that a speculator was not shown are gone."""
    request = candidate.request
    return estimate.needs_states and request.num_computed - seen.get(request.number, 0) > WINDOW


def is_about_to_lose_states(estimate: SpeculatorEstimate, candidate: Candidate) -> bool:
    """Whether a row's first states that a speculator has not seen will soon be gone, and it has seen all others."""
    return estimate.needs_states and not candidate.row.is_blind and _SHOWN_AT <= candidate.gap < WINDOW


# ---- waking -------------------------------------------------------------------------------------------------------------


def choose_probes(
    estimate: SpeculatorEstimate,
    forecast: StepForecast,
    budget: ExplorationBudget,
    idle: Sequence[Candidate],
    depths: Sequence[int],
    step: int,
) -> tuple[list[Candidate], int | None]:
    """As many rows as the budget affords: those whose last probe was accepted, then the cheapest first.

    Other rows profit from what is found out, since what is known of all rows is where each of them begins.

    Args:
        estimate: the speculator.
        forecast: the step that is being prepared.
        budget: what the probes are paid from.
        idle: rows that sleep.
        depths: those that the speculator is asked for already.
        step: the step's number.

    Returns:
        The rows to probe now, and the first later step in which another could be; None if that is never.
    """
    together = estimate.settings.probed_together
    waiting = [c for c in idle if c.row.guess is None]
    for candidate in waiting:
        if candidate.row.wake_at < 0:
            candidate.row.wake_at = step + (0 if estimate.token_only else _first_look(estimate.settings, candidate))
    times = [_ready_at(estimate, c.row, c.gap, step) for c in waiting]
    # A guess for one row more costs next to nothing, so those that are to be woken soon do not wake by themselves.
    latest = step + together if estimate.compares and step in times else step
    ready = [c for c, at in zip(waiting, times, strict=True) if at <= latest]
    later = min((at for at in times if at > latest), default=None)
    if not ready:
        return [], _not_before(later, estimate, forecast, budget, waiting, step)
    ready.sort(key=lambda c: (not c.row.is_owed, c.row.misses > 0, c.gap, c.row.wake_at))
    deepest = max(depths, default=0)
    target, nodes = forecast.curve.seconds, forecast.nodes
    while True:
        cost = estimate.seconds(len(depths) + len(ready), max(deepest, 1))
        cost -= estimate.seconds(len(depths), deepest) if depths else 0.0
        if behind := sum(c.gap for c in ready if c.gap > SHORT_GAP):
            cost += estimate.catch_up.seconds(behind)
        if not estimate.compares:
            cost += target(nodes + math.ceil(len(ready) * estimate.width)) - target(nodes)
        # What a prompt was processed for, and what was accepted last time, is tried whatever the budget holds.
        overdraft = target(0) if any(c.row.is_owed or (c.row.is_probe and not c.row.misses) for c in ready) else 0.0
        overdraft -= max(_reserve(estimate, c, target(0)) for c in ready)
        if budget.affords(cost, overdraft):
            return ready, later
        if len(ready) == 1:
            break
        ready = ready[: len(ready) // 2]
    affordable = step + budget.steps_until(
        cost - overdraft, 0.0 if estimate.token_only else estimate.catch_up.per_token
    )
    later = affordable if later is None else min(later, affordable)
    return [], _not_before(later, estimate, forecast, budget, waiting, step)


def _not_before(
    at: int | None,
    estimate: SpeculatorEstimate,
    forecast: StepForecast,
    budget: ExplorationBudget,
    waiting: Sequence[Candidate],
    step: int,
) -> int | None:
    """A step to look again in: some steps away, and none in which the budget will not hold what the least probe takes."""
    if at is None or estimate.token_only:
        return at
    target, nodes = forecast.curve.seconds, forecast.nodes
    least = estimate.seconds(1, 1) + target(nodes + math.ceil(estimate.width)) - target(nodes)
    if any(c.row.is_owed for c in waiting):
        least -= target(0)
    return max(at, step + estimate.settings.probed_together, step + budget.steps_until(least, 0.0))


def _first_look(settings: AdaptiveSettings, candidate: Candidate) -> int:
    """After how many steps a row is probed first, spread over rows: text right after a prompt differs from later text."""
    within = settings.first_look_within
    return int(within * (candidate.request.number * _GOLDEN % 1.0)) if candidate.row.is_owed else within


def _reserve(estimate: SpeculatorEstimate, candidate: Candidate, step: float) -> float:
    """What the budget must still hold after a probe: of a row that the speculator is blind to, the next prompt."""
    if not candidate.row.is_blind:
        return 0.0
    prompt = estimate.catch_up.seconds(candidate.request.num_prompt_tokens)
    return min(prompt, estimate.settings.most_reserved * step)


def _ready_at(estimate: SpeculatorEstimate, row: RowEstimate, gap: int, step: int) -> int:
    """The first step, this one or a later one, in which a row should be woken.

    A speculator that needs the target's states is shown them before they are lost.
    """
    if not estimate.needs_states or gap >= WINDOW:
        return max(step, row.wake_at)
    return max(step, min(row.wake_at, step + _SHOWN_AT - gap))


# ---- resting ------------------------------------------------------------------------------------------------------------


class Resting:
    """Leaves sleeping rows alone until one could be asked for again: their steps then cost what plain ones do.

    Attributes:
        is_resting: whether this step is skipped.
        is_forbidden: whether a row drafts, or nearly would: then none is skipped.
    """

    def __init__(self, settings: AdaptiveSettings) -> None:
        self._settings = settings
        self.is_resting = False
        self.is_forbidden = False
        self._probed = False
        self._wake_at: int | None = None
        self._rows: list[int] = []
        self._until = 0

    def holds(self, requests: Sequence[Row], step: int) -> bool:
        """Whether this step is skipped: no row has come, gone or got a prompt to compute."""
        self.is_resting = self.lasts(requests, step)
        return self.is_resting

    def lasts(self, requests: Sequence[Row], step: int) -> bool:
        """Whether a step would be skipped."""
        return (
            step < self._until
            and self._rows == [request.number for request in requests]
            and all(request.num_pending == 1 for request in requests)
        )

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

    def plan(self, requests: Sequence[Row], rows: Iterable[RowEstimate], step: int, most: int | None = None) -> None:
        """Decides how many of the steps after this one are skipped, `most` at most.

        Args:
            requests: the rows of the batch.
            rows: what is known of them, for every speculator.
            step: the step's number.
            most: steps that are skipped at most; None for the settings'.
        """
        if self.is_forbidden:
            return
        settings = self._settings
        if most is None:
            often = settings.rest_misses
            is_long = all(row.misses >= often or not row.acceptance.first_reached for row in rows)
            most = settings.long_rest if is_long else settings.rest
        self._until = step + most
        if self._wake_at is not None:
            self._until = min(self._until, self._wake_at)
        self._rows = [request.number for request in requests]
