"""Which depth of drafts is best for every row by the estimates, and which nodes of scored drafts are worth verifying."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence

import attrs

from specplug.plugins.registry import RegisteredSpeculator
from specplug.speculation.adaptive.estimates import SpeculatorEstimate, deepest_useful, tokens_left
from specplug.speculation.adaptive.exploration import ExplorationBudget
from specplug.speculation.adaptive.goodput import StepForecast
from specplug.speculation.adaptive.row_estimate import Candidate, RowEstimate
from specplug.speculation.draft import Draft, trim_drafts
from specplug.speculation.draft_length import SHORT_GAP, Length
from specplug.speculation.row import Row

Called = tuple[Row, RowEstimate, int]
"""A row that drafts, and how deep."""


@attrs.frozen(eq=False)
class HeldPlan:
    """What a speculator was asked for, to be asked for again in some steps.

    Attributes:
        numbers: of the requests that it may be asked for.
        lengths: what each may draft.
        called: those that draft.
        until: the step in which it ends.
    """

    numbers: list[int]
    lengths: list[Length]
    called: list[Called]
    until: int

    def holds(self, requests: Sequence[Row], step: int) -> bool:
        """Whether it may still be used for these rows."""
        return step < self.until and self.numbers == [request.number for request in requests]


def is_planned(estimate: SpeculatorEstimate, candidates: Iterable[Candidate], step: int) -> bool:
    """Whether the depths that were chosen a few steps ago still hold."""
    at = estimate.planned_at
    return step < estimate.planned_until and all(c.row.planned_at == at for c in candidates)


def choose_depths(
    estimate: SpeculatorEstimate,
    later: Sequence[SpeculatorEstimate],
    candidates: Sequence[Candidate],
    forecast: StepForecast,
    budget: ExplorationBudget,
    step: int,
) -> None:
    """Chooses the depths that maximise goodput, and notes them in the rows.

    Args:
        estimate: the speculator.
        later: the speculators that are asked after it, for rows without a draft.
        candidates: the rows that may be given a draft.
        forecast: the step that is being prepared.
        budget: what is tried is paid from it.
        step: the step's number.
    """
    settings = estimate.settings
    least, base = forecast.least_gain, forecast.rate
    gains = [estimate.gains(c.row, c.limit, least, c.request.num_output_tokens) for c in candidates]
    left = {
        number for number, c in enumerate(candidates) if _is_better_left(estimate, later, c, gains[number], forecast)
    }
    for number in left:
        gains[number] = []
    depths, rate = forecast.divide(estimate, gains)
    behind = {n: c for n, (c, depth) in enumerate(zip(candidates, depths, strict=True)) if depth and c.gap > SHORT_GAP}
    together = sum(c.gap for c in behind.values())
    late = {
        number
        for number, c in behind.items()
        if not forecast.repays(estimate.catch_up.share(c.gap, together), tokens_left(c.request), rate)
    }
    if late:
        for number in late:
            gains[number] = []
        depths, rate = forecast.divide(estimate, gains)
    if not any(depths):
        depths = _try_out(estimate, candidates, left | late, forecast, budget, step)
    if (
        estimate.continuation and len(candidates) == 1
    ):  # how deep is left to it, but not wholly: its scores may be wrong
        depths = [
            min(depth + settings.leeway, c.limit) if depth and c.row.stops else depth
            for depth, c in zip(depths, candidates, strict=True)
        ]
    estimate.min_probability, estimate.min_surplus = forecast.min_gains(estimate, depths, rate)
    estimate.gain = rate / base
    estimate.is_close = any(depths) or forecast.might_pay(estimate, gains)
    estimate.planned_at, estimate.planned_until = step, step + _steps_to_hold(estimate, candidates, depths)
    for candidate, depth in zip(candidates, depths, strict=True):
        row = candidate.row
        if row.depth and not depth:
            row.misses, row.wake_at = 1, step + 2
        row.depth = depth
        row.planned_at = step


def _steps_to_hold(estimate: SpeculatorEstimate, candidates: Sequence[Candidate], depths: Sequence[int]) -> int:
    """For how long depths hold: until as many drafts have come of the rows as half of those they are judged by, on average."""
    settings = estimate.settings
    drafting = [c.row for c, depth in zip(candidates, depths, strict=True) if depth]
    if not drafting:
        return settings.hold_steps
    others = 1.0 - 1.0 / len(drafting)
    news = sum(1.0 / (1.0 + estimate.evidence(row, others) / settings.drafts_per_hold) for row in drafting)
    steps = round(len(drafting) / news / max(estimate.fill, settings.least_fill))
    return min(settings.hold_steps, max(1, steps))


def _try_out(
    estimate: SpeculatorEstimate,
    candidates: Sequence[Candidate],
    left: Container[int],
    forecast: StepForecast,
    budget: ExplorationBudget,
    step: int,
) -> list[int]:
    """Depths that nearly pay, if what may be lost until the next choice is affordable; else none.

    What is done now and then finds cold caches and seems to cost more than if it were done at every step. Where nothing else
    was measured lately, it is assumed to cost less.

    Args:
        estimate: the speculator.
        candidates: the rows that may be given a draft.
        left: the places among them of those that are not tried.
        forecast: the step that is being prepared.
        budget: what is paid from.
        step: the step's number.
    """
    settings, is_known = estimate.settings, estimate.was_warm(step)
    if estimate.acceptance.is_hopeless and not any(c.row.acceptance.first_accepted for c in candidates):
        return [0] * len(candidates)
    view = forecast if is_known else forecast.if_warm()
    least = view.least_gain
    gains = [
        [] if number in left else estimate.gains(c.row, c.limit, least, c.request.num_output_tokens)
        for number, c in enumerate(candidates)
    ]
    depths, rate = view.divide(estimate, gains, settings.try_from if is_known else settings.try_cold_from)
    if any(depths):
        lost = max(0.0, 1.0 - rate / forecast.rate) + (0.0 if is_known else settings.cold_doubt)
        gaps = sum(c.gap for c, depth in zip(candidates, depths, strict=True) if depth and c.gap > SHORT_GAP)
        seconds = lost * settings.hold_steps * forecast.tokens / forecast.rate
        # On credit, what was not measured lately; and what a prompt was processed for, when that is due.
        is_due = not is_known or any(c.row.is_owed and 0 <= c.row.wake_at <= step for c in candidates)
        overdraft = settings.advanced_steps * forecast.tokens / forecast.rate if is_due else 0.0
        if gaps:
            seconds += estimate.catch_up.seconds(gaps)
        if budget.affords(seconds, overdraft):
            return depths
    return [0] * len(candidates)


def _is_better_left(
    estimate: SpeculatorEstimate,
    later: Sequence[SpeculatorEstimate],
    candidate: Candidate,
    gains: Sequence[float],
    forecast: StepForecast,
) -> bool:
    """Whether a row is better drafted for by a speculator that comes later in the chain."""
    if not gains:
        return False
    request, own = candidate.request, 0.0
    for number, other in enumerate(later):
        limit = 0 if other.is_retired else deepest_useful(other, request)
        others = other.gains(other.row(request), limit, 0.002, request.num_output_tokens) if limit > 0 else []
        own = forecast.worth(estimate, gains) if not number else own
        if others and forecast.worth(other, others) > estimate.settings.preference * own:
            return True
    return False


def keep_what_pays(
    drafts: Sequence[Draft | None],
    estimates: dict[RegisteredSpeculator, SpeculatorEstimate],
    forecast: StepForecast,
) -> list[Draft | None]:
    """Keeps as many of the best nodes of all scored drafts as pay; other drafts stay as they are.

    So do the chains of a speculator that stops where it is unsure: they end where another token was not worth its costs.

    A score is taken as the logarithm of the probability that the node is accepted, corrected by how such scores came true so
    far. Every draft's share is decided by scores alone, as in `trim_drafts`.
    """
    scored: list[Draft | None] = []
    probabilities: list[float] = []
    for draft in drafts:
        scored.append(None)
        if draft is not None and draft.scores is not None and draft.speculator is not None:
            estimate = estimates[draft.speculator]
            if not estimate.continuation or draft.parents is not None:
                scored[-1] = draft
                calibration = estimate.calibration
                probabilities += [math.exp(min(score, 0.0)) * calibration for score in draft.scores]
    least = sum(draft is not None for draft in scored)
    if len(probabilities) <= least:
        return list(drafts)
    others = sum(len(draft) for draft in drafts if draft is not None) - len(probabilities)
    kept = max(_worth_verifying(sorted(probabilities, reverse=True), others, forecast), least)
    if kept == len(probabilities):
        return list(drafts)
    trimmed = trim_drafts(scored, kept)
    return [own if cut is None else cut for own, cut in zip(drafts, trimmed, strict=True)]


def _worth_verifying(probabilities: Sequence[float], others: int, forecast: StepForecast) -> int:
    """Of nodes with these probabilities, most likely first, how many maximise goodput, next to those of other drafts."""
    tokens, spent = float(forecast.rows), forecast.spent
    seconds = forecast.curve.table(others, others + len(probabilities) + 1)
    best, kept = tokens / (seconds[0] + spent), 0
    for count, probability in enumerate(probabilities, start=1):
        tokens += min(probability, 1.0)
        rate = tokens / (seconds[count] + spent)
        if rate > best:
            best, kept = rate, count
    return kept
