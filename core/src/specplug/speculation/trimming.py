"""How many nodes of scored drafts are worth verifying."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specplug.speculation.draft import Draft, trim_drafts
from specplug.speculation.estimates import LinkEstimate
from specplug.speculation.prospect import Prospect


def keep_what_pays(
    drafts: Sequence[Draft | None], links: Sequence[LinkEstimate], prospect: Prospect
) -> list[Draft | None]:
    """Keeps as many of the best nodes of all scored drafts as pay; other drafts stay as they are.

    So do the chains of a speculator that stops where it is unsure: they end where another token was not worth its costs.

    A score is taken as the logarithm of the chance that the node is accepted, corrected by how such promises were kept so far.
    Every draft's share is decided by scores alone, as in `trim_drafts`.
    """
    scored = [draft if draft is not None and _may_be_cut(draft, links[draft.link]) else None for draft in drafts]
    chances = [
        math.exp(min(score, 0.0)) * links[draft.link].calibration
        for draft in scored
        if draft is not None
        for score in draft.scores or ()
    ]
    least = sum(draft is not None for draft in scored)
    if len(chances) <= least:
        return list(drafts)
    others = sum(len(draft) for draft in drafts if draft is not None) - len(chances)
    kept = max(_worth_verifying(sorted(chances, reverse=True), others, prospect), least)
    if kept == len(chances):
        return list(drafts)
    trimmed = trim_drafts(scored, kept)
    return [own if cut is None else cut for own, cut in zip(drafts, trimmed, strict=True)]


def _may_be_cut(draft: Draft, link: LinkEstimate) -> bool:
    return draft.scores is not None and not (link.going and draft.parents is None)


def _worth_verifying(chances: Sequence[float], others: int, prospect: Prospect) -> int:
    """Of nodes with these chances, likeliest first, how many make the most tokens per second, beside those of other drafts."""
    tokens, spent = float(prospect.rows), prospect.spent
    seconds = prospect.curve.table(others, others + len(chances) + 1)
    best, kept = tokens / (seconds[0] + spent), 0
    for count, chance in enumerate(chances, start=1):
        tokens += min(chance, 1.0)
        rate = tokens / (seconds[count] + spent)
        if rate > best:
            best, kept = rate, count
    return kept
