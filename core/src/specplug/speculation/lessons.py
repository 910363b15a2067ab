"""What became of drafts, for the automatic budget to learn from: of several steps at once where nobody waits for it."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from specplug.speculation.draft import Draft
from specplug.speculation.estimates import LinkEstimate, RowEstimate


@attrs.frozen(eq=False)
class _Lesson:
    link: LinkEstimate
    row: RowEstimate
    draft: Draft | None
    accepted: Sequence[int]
    nodes: int
    step: int
    position: int


class Lessons:
    """Drafts that were verified, until they are taken in: one by one each would find cold caches.

    Attributes:
        since: the step of the first that waits; None if none does.
    """

    def __init__(self) -> None:
        self.since: int | None = None
        self._waiting: list[_Lesson] = []

    def add(
        self, link: LinkEstimate, row: RowEstimate, accepted: Sequence[int], nodes: int, step: int, position: int
    ) -> None:
        """Notes what became of a row's draft.

        Args:
            link: whose it was.
            row: of which row.
            accepted: the nodes that were, from the root down.
            nodes: how many were verified.
            step: the step's number.
            position: the place in the output that the first node was for.
        """
        self.since = step if self.since is None else self.since
        self._waiting.append(_Lesson(link, row, row.draft, accepted, nodes, step, position))
        row.draft = None

    def take_in(self) -> bool:
        """Learns from all of them; returns whether something so unlikely was seen of a row that it is to be judged anew."""
        waiting, self._waiting, self.since = self._waiting, [], None
        for lesson in waiting:
            _learn(lesson)
        return any(lesson.row.settled_at < 0 for lesson in waiting)


def _learn(lesson: _Lesson) -> None:
    draft, accepted = lesson.draft, lesson.accepted
    count = len(accepted)
    rejected = count < lesson.nodes
    stopped = False
    if draft is not None:
        stopped = not rejected and draft.stopped and lesson.nodes == draft.proposed
        if rejected and draft.parents is not None:
            rejected = (accepted[-1] if count else -1) in draft.parents
        lesson.link.observe_scores(draft, count)
    lesson.link.learn(lesson.row, count, rejected=rejected, step=lesson.step, position=lesson.position, stopped=stopped)
