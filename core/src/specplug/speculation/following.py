"""Whether a speculator that keeps a state of its own is shown a text: before it drafts for it, and while it sleeps.

The target's states are kept for the last positions of a row alone. A speculator that reads them and was not shown the rest, a
prompt above all, is *blind* to it: it goes on with what it has, and its drafts are worse for as long as the text lasts.
"""

from __future__ import annotations

from collections.abc import Mapping

from specplug.request import Request
from specplug.speculation.acceptance import RowAcceptance
from specplug.speculation.candidate import Candidate, tokens_left
from specplug.speculation.estimates import LinkEstimate
from specplug.speculation.probing import Probing
from specplug.speculation.prospect import Prospect
from specplug.speculation.target_states.ring_buffer import WINDOW

WINDOW_END = 8
"""Sleeping rows are shown their states when so many positions are left of those that are kept."""


def missed_tokens(link: LinkEstimate, computed: int, seen: int) -> int:
    """How many tokens a speculator must take in of a row: of target states no more than are kept."""
    if link.token_only:
        return 0
    return min(computed - seen, WINDOW) if link.speculator.traits.needs_states else computed - seen


def follows(link: LinkEstimate, request: Request, prospect: Prospect, account: Probing, *, has_begun: bool) -> bool:
    """Whether a speculator with a state takes in a prompt while it is computed: drafts may pay, or to see is cheap.

    Args:
        link: the speculator.
        request: the row.
        prospect: the step that is being prepared.
        account: what is paid from where drafts would not pay by what is known of other rows.
        has_begun: whether it was shown a part of the prompt.
    """
    if link.token_only or request.params.num_speculative_tokens == 0:
        return False
    if has_begun or not link.is_auto or not (link.asks or link.feed):
        return True
    halfway = tokens_left(request) // 2
    gains = RowAcceptance().gains(link.acceptance, link.depth_to_try, prospect.least_gain, halfway)
    _, rate = prospect.divide(link, [gains] * prospect.rows)
    length = request.num_prompt_tokens
    if account.is_sound and prospect.repays(link, length, tokens_left(request), rate):
        return True
    return account.affords(link.feed * length, account.advance(tokens_left(request)))


def begins(link: LinkEstimate, candidate: Candidate, seen: Mapping[int, int]) -> bool:
    """Whether a speculator was never shown a row: its prompt must be taken in now, if it has just been computed."""
    is_new = candidate.row.settled_at < 0 and candidate.request.number not in seen
    return is_new and link.speculator.traits.needs_states


def has_lost_states(link: LinkEstimate, candidate: Candidate, seen: Mapping[int, int]) -> bool:
    """Whether some states that a speculator was not shown are gone."""
    request = candidate.request
    return link.speculator.traits.needs_states and request.num_computed - seen.get(request.number, 0) > WINDOW


def is_about_to_lose_states(link: LinkEstimate, candidate: Candidate) -> bool:
    """Whether a row's first states that a speculator has not seen will soon be gone, and it has seen all others."""
    is_kept = link.speculator.traits.needs_states and not candidate.row.is_blind
    return is_kept and WINDOW - WINDOW_END <= candidate.gap < WINDOW
