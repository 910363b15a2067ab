"""What the adaptive policy knows of one row, as one speculator sees it."""

from __future__ import annotations

import attrs

from specplug.contract.types import Outcome
from specplug.speculation.adaptive.acceptance import RowAcceptance
from specplug.speculation.adaptive.guess import Guess
from specplug.speculation.draft import Draft
from specplug.speculation.row import Row


@attrs.define(eq=False)
class RowEstimate:
    """One row as one speculator sees it.

    Attributes:
        acceptance: of its drafts.
        depth: the draft length that was chosen last.
        planned_at: the step in which that was; -1 when it must be chosen anew.
        is_probe: whether its last draft was only to see whether drafts would be accepted by now.
        misses: probes in a row that were not accepted.
        wake_at: the step from which on it may be probed again; -1 before that was decided.
        is_owed: whether the speculator was shown its prompt, and was not asked for a draft since.
        guess: a proposal that is compared with the text, not verified.
        is_blind: whether the speculator was not shown a part of the text; see `sleeping`.
        stops: whether its last draft was one that may stop where the speculator is unsure.
    """

    acceptance: RowAcceptance = attrs.field(factory=RowAcceptance)
    depth: int = 0
    planned_at: int = -1
    is_probe: bool = False
    misses: int = 0
    wake_at: int = -1
    is_owed: bool = False
    guess: Guess | None = None
    is_blind: bool = False
    stops: bool = False


@attrs.define(eq=False)
class Candidate:
    """A row that may be given a draft.

    Attributes:
        place: in the list of requests.
        request: the row.
        row: what is known of it.
        limit: the deepest draft it can use.
        gap: tokens that a speculator with a state has not processed.
    """

    place: int
    request: Row
    row: RowEstimate
    limit: int
    gap: int


@attrs.frozen(eq=False)
class VerifiedDraft:
    """A draft that was verified.

    Attributes:
        row: whose it was.
        draft: the draft.
        outcome: what became of it.
        step: the number of the step that verified it.
        position: the output position that the first node was for.
    """

    row: RowEstimate
    draft: Draft
    outcome: Outcome
    step: int
    position: int
