"""How many nodes of scored drafts are worth verifying."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specplug.speculation.allocation import allocate
from specplug.speculation.draft import Draft, trim_drafts
from specplug.speculation.estimates import LinkEstimate
from specplug.speculation.prospect import Prospect


def keep_what_pays(
    drafts: Sequence[Draft | None], links: Sequence[LinkEstimate], prospect: Prospect
) -> list[Draft | None]:
    """Keeps as many of the best nodes of all scored drafts as pay; other drafts stay as they are.

    A score is taken as the logarithm of the chance that the node is accepted, corrected by how such promises were kept so far.
    Every draft's share is decided by scores alone, as in `trim_drafts`.
    """
    scored = [draft if draft is not None and draft.scores is not None else None for draft in drafts]
    chances = sorted(
        (
            min(1.0, math.exp(min(score, 0.0)) * links[draft.link].calibration)
            for draft in scored
            if draft is not None and draft.scores is not None
            for score in draft.scores
        ),
        reverse=True,
    )
    if not chances:
        return list(drafts)
    (kept,), _ = allocate(
        [chances],
        tokens=float(prospect.rows),
        nodes=sum(len(draft) for draft in drafts if draft is not None and draft.scores is None),
        width=1.0,
        target=prospect.curve.seconds,
        ask=lambda rows: [0.0] * len(chances),
        spent=prospect.spent,
    )
    most = max(kept, sum(draft is not None for draft in scored))
    trimmed = trim_drafts(scored, most)
    return [
        own if draft is None or draft.scores is not None else draft for draft, own in zip(drafts, trimmed, strict=True)
    ]
