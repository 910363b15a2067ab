"""Which of the rows that sleep are tried again, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specplug.speculation.asked import SHORT_GAP
from specplug.speculation.candidate import Candidate
from specplug.speculation.estimates import LinkEstimate, RowEstimate
from specplug.speculation.following import WINDOW_END
from specplug.speculation.probing import Probing
from specplug.speculation.prospect import Prospect
from specplug.speculation.target_states.ring_buffer import WINDOW

_FIRST_WITHIN, _GOLDEN = 32, 0.6180339887
_TOGETHER, _MOST_RESERVED = 4, 2.0


def choose_probes(
    link: LinkEstimate,
    prospect: Prospect,
    account: Probing,
    idle: Sequence[Candidate],
    asked: Sequence[int],
    step: int,
) -> tuple[list[Candidate], int | None]:
    """As many rows as the account affords: those whose last probe was accepted, then the cheapest first.

    Other rows profit from what is found out, since what is known of all rows is where each of them begins.

    Args:
        link: the speculator.
        prospect: the step that is being prepared.
        account: what the probes are paid from.
        idle: rows that sleep.
        asked: the depths that the speculator is asked for already.
        step: the step's number.

    Returns:
        The rows to probe now, and the first later step in which another could be; None if that is never.
    """
    waiting = [c for c in idle if c.row.guess is None]
    for candidate in waiting:
        if candidate.row.wake_at < 0:
            candidate.row.wake_at = step + (0 if link.token_only else _first_look(candidate))
    times = [ready_at(link, c.row, c.gap, step) for c in waiting]
    # A guess for one row more costs next to nothing, so those that are to be woken soon do not wake by themselves.
    latest = step + _TOGETHER if link.compares and step in times else step
    ready = [c for c, at in zip(waiting, times, strict=True) if at <= latest]
    later = min((at for at in times if at > latest), default=None)
    if not ready:
        return [], _not_before(later, link, prospect, account, waiting, step)
    ready.sort(key=lambda c: (not c.row.is_owed, c.row.misses > 0, c.gap, c.row.wake_at))
    deepest = max(asked, default=0)
    target, nodes = prospect.curve.seconds, prospect.nodes
    while True:
        cost = link.ask_seconds(len(asked) + len(ready), max(deepest, 1))
        cost -= link.ask_seconds(len(asked), deepest) if asked else 0.0
        cost += link.feed * sum(c.gap for c in ready if c.gap > SHORT_GAP)
        if not link.compares:
            cost += target(nodes + math.ceil(len(ready) * link.width)) - target(nodes)
        # What a prompt has been taken in for, and what was accepted last time, is looked at whatever the account holds.
        overdraft = target(0) if any(c.row.is_owed or (c.row.probes and not c.row.misses) for c in ready) else 0.0
        overdraft -= max(_reserve(link, c, target(0)) for c in ready)
        if account.affords(cost, overdraft):
            return ready, later
        if len(ready) == 1:
            break
        ready = ready[: len(ready) // 2]
    affordable = step + account.steps_until(cost - overdraft, 0.0 if link.token_only else link.feed)
    later = affordable if later is None else min(later, affordable)
    return [], _not_before(later, link, prospect, account, waiting, step)


def _not_before(
    at: int | None, link: LinkEstimate, prospect: Prospect, account: Probing, waiting: Sequence[Candidate], step: int
) -> int | None:
    """A step to look again in: some steps away, and none in which the account will not hold what the least probe takes."""
    if at is None or link.token_only:
        return at
    target, nodes = prospect.curve.seconds, prospect.nodes
    least = link.ask_seconds(1, 1) + target(nodes + math.ceil(link.width)) - target(nodes)
    if any(c.row.is_owed for c in waiting):
        least -= target(0)
    return max(at, step + _TOGETHER, step + account.steps_until(least, 0.0))


def _first_look(candidate: Candidate) -> int:
    """After how many steps a row is probed first: what comes right behind a prompt is not like all that follows."""
    return int(_FIRST_WITHIN * (candidate.request.number * _GOLDEN % 1.0)) if candidate.row.is_owed else _FIRST_WITHIN


def _reserve(link: LinkEstimate, candidate: Candidate, step: float) -> float:
    """What the account must still hold after a probe: of a row that the speculator is blind to, the next prompt."""
    if not candidate.row.is_blind:
        return 0.0
    return min(link.feed * candidate.request.num_prompt_tokens, _MOST_RESERVED * step)


def ready_at(link: LinkEstimate, row: RowEstimate, gap: int, step: int) -> int:
    """The first step, this one or a later one, in which a row should be woken.

    A speculator that needs the target's states is shown them before they are lost.
    """
    if not link.speculator.traits.needs_states or gap >= WINDOW:
        return max(step, row.wake_at)
    return max(step, min(row.wake_at, step + WINDOW - WINDOW_END - gap))
