"""Which depth of drafts is best for every row, by what is known now; looked for anew every few steps."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from specplug.request import Request
from specplug.speculation.asked import SHORT_GAP
from specplug.speculation.candidate import Candidate, deepest_useful, tokens_left
from specplug.speculation.estimates import LinkEstimate, estimate_of
from specplug.speculation.probing import Probing
from specplug.speculation.prospect import Prospect

SETTLED_STEPS = 8
_DRAFTS_PER_PATIENCE = 2.0
_MARGIN = 1.02
_PREFERENCE = 1.1
_NEARLY, _PERHAPS, _DOUBT = 0.93, 0.85, 0.1
_ADVANCED_STEPS = 3.0
_LEEWAY = 2
_LEAST_FILL = 0.25


def is_settled(link: LinkEstimate, candidates: Iterable[Candidate], step: int) -> bool:
    """Whether the depths that were found best a few steps ago still hold."""
    at = link.settled_at
    return step < link.settled_until and all(c.row.settled_at == at for c in candidates)


def settle(
    place: int,
    links: Sequence[LinkEstimate],
    candidates: Sequence[Candidate],
    prospect: Prospect,
    account: Probing,
    step: int,
) -> None:
    """Looks for the best depths, and notes them in the rows.

    Args:
        place: the speculator's place in the chain.
        links: the speculators of the chain.
        candidates: the rows that may be given a draft.
        prospect: the step that is being prepared.
        account: what is tried is paid from it.
        step: the step's number.
    """
    link = links[place]
    least, base = prospect.least_gain, prospect.rate
    for candidate in candidates:
        row = candidate.row
        if not row.depth and row.settled_at >= 0:
            row.acceptance.fade(step - row.settled_at)
    gains = [link.gains(c.row, c.limit, least, c.request.num_output_tokens) for c in candidates]
    left: set[int] = set()
    if place + 1 < len(links):
        for number, candidate in enumerate(candidates):
            if gains[number] and _is_better_left(place, links, candidate.request, gains[number], prospect):
                gains[number] = []
                left.add(number)
    margin = 1.0 if any(c.row.depth for c in candidates) else _MARGIN
    depths, rate = prospect.divide(link, gains, margin)
    late = [
        number
        for number, (c, depth) in enumerate(zip(candidates, depths, strict=True))
        if depth and c.gap > SHORT_GAP and not prospect.repays(link, c.gap, tokens_left(c.request), rate)
    ]
    if late:
        for number in late:
            gains[number] = []
        depths, rate = prospect.divide(link, gains, margin)
    if not any(depths):
        left.update(late)
        depths = _try_out(link, candidates, left, prospect, account, step)
    if link.going and len(candidates) == 1:  # how deep is left to it, but not wholly: its chances may be wrong
        depths = [
            min(depth + _LEEWAY, c.limit) if depth and c.row.stops else depth
            for depth, c in zip(depths, candidates, strict=True)
        ]
    link.least_chance, link.least_sum = prospect.least_chances(link, depths, rate)
    link.gain = rate / base
    link.is_close = any(depths) or prospect.might_pay(link, gains)
    link.settled_at, link.settled_until = step, step + _steps_to_hold(link, candidates, depths)
    for candidate, depth in zip(candidates, depths, strict=True):
        row = candidate.row
        if row.depth and not depth:
            row.misses, row.wake_at = 1, step + 2
        row.depth = depth
        row.settled_at = step


def _steps_to_hold(link: LinkEstimate, candidates: Sequence[Candidate], depths: Sequence[int]) -> int:
    """For how long depths hold: until as many drafts have come of the rows as half of those they are judged by, on average."""
    drafting = [c.row for c, depth in zip(candidates, depths, strict=True) if depth]
    if not drafting:
        return SETTLED_STEPS
    others = 1.0 - 1.0 / len(drafting)
    news = sum(1.0 / (1.0 + link.drafts_behind(row, others) / _DRAFTS_PER_PATIENCE) for row in drafting) / len(drafting)
    return min(SETTLED_STEPS, max(1, round(1.0 / news / max(link.fill, _LEAST_FILL))))


def _try_out(
    link: LinkEstimate,
    candidates: Sequence[Candidate],
    left: Container[int],
    prospect: Prospect,
    account: Probing,
    step: int,
) -> list[int]:
    """Depths that nearly pay, if what may be lost until the next look is affordable; else none.

    What is done now and then finds cold caches and seems to cost more than if it were done at every step. Where nothing else
    was measured lately, it is taken to cost less.

    Args:
        link: the speculator.
        candidates: the rows that may be given a draft.
        left: the places among them of those that are not tried.
        prospect: the step that is being prepared.
        account: what is paid from.
        step: the step's number.
    """
    is_known = link.was_warm(step)
    if link.acceptance.is_hopeless and not any(c.row.acceptance.first_accepted for c in candidates):
        return [0] * len(candidates)
    view = prospect if is_known else prospect.if_warm()
    least = view.least_gain
    gains = [
        [] if number in left else link.gains(c.row, c.limit, least, c.request.num_output_tokens)
        for number, c in enumerate(candidates)
    ]
    depths, rate = view.divide(link, gains, _NEARLY if is_known else _PERHAPS)
    if any(depths):
        lost = max(0.0, 1.0 - rate / prospect.rate) + (0.0 if is_known else _DOUBT)
        gaps = sum(c.gap for c, depth in zip(candidates, depths, strict=True) if depth and c.gap > SHORT_GAP)
        seconds = lost * SETTLED_STEPS * prospect.tokens / prospect.rate
        # On credit, what was not measured lately; and what a prompt has been taken in for, when that is due.
        is_due = not is_known or any(c.row.is_owed and 0 <= c.row.wake_at <= step for c in candidates)
        overdraft = _ADVANCED_STEPS * prospect.tokens / prospect.rate if is_due else 0.0
        if account.affords(seconds + link.feed * gaps, overdraft):
            return depths
    return [0] * len(candidates)


def _is_better_left(
    place: int, links: Sequence[LinkEstimate], request: Request, gains: Sequence[float], prospect: Prospect
) -> bool:
    """Whether a row is better drafted for by a speculator that comes later in the chain."""
    own = None
    for later in range(place + 1, len(links)):
        link = links[later]
        limit = 0 if link.retired else deepest_useful(link, request)
        row, position = estimate_of(request, later, len(links)), request.num_output_tokens
        others = link.gains(row, limit, 0.002, position) if limit > 0 else []
        if others:
            own = prospect.worth(links[place], gains) if own is None else own
            if prospect.worth(link, others) > _PREFERENCE * own:
                return True
    return False
