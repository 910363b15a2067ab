"""How likely the drafts of a speculator are to be accepted, for a row and for all rows. Knows nothing about time."""

from __future__ import annotations

import attrs

from specplug.speculation.adaptive.settings import AdaptiveSettings

_POSITIONS = 5


class AcceptanceModel:
    """What all rows together have seen of one speculator: where every new row starts from.

    How much a row's own drafts count against those of all others is learned too: rows may be alike or not.

    Attributes:
        settings: what is assumed, and how fast it learns.
        accepted: for each depth (depth 1 first), drafts accepted there, lately.
        reached: drafts whose node there was decided, its ancestors being accepted.
        trust: as how many drafts of a row the acceptance of all rows counts.
        misses: drafts in a row of which nothing was accepted.
        at_positions: for each range of output positions (0 to 7, to 31, to 127, to 511, all others) the first nodes that were
            accepted there, and drafts: acceptance right after a prompt differs from acceptance later.
    """

    def __init__(self, depth: int, settings: AdaptiveSettings) -> None:
        self.settings = settings
        self.accepted = [0.0] * depth
        self.reached = [0.0] * depth
        self.accepted[0] = settings.first_acceptance * settings.first_drafts
        self.reached[0] = settings.first_drafts
        self.trust = settings.trusts[0]
        self.misses = 0
        self.at_positions = [[0.0, 0.0] for _ in range(_POSITIONS)]
        self._losses = [0.0] * len(settings.trusts)

    @property
    def first(self) -> float:
        """The probability that the first node of a draft is accepted."""
        return self.accepted[0] / self.reached[0]

    def first_at(self, position: int) -> float:
        """The same, of drafts for the token at an output position."""
        accepted, drafts = self.at_positions[_range_of(position)]
        trust = self.settings.position_trust
        return (accepted + trust * self.first) / (drafts + trust)

    @property
    def is_hopeless(self) -> bool:
        """Whether next to nothing was accepted lately."""
        return self.misses >= self.settings.hopeless_misses and self.first < self.settings.hopeless_below

    @property
    def hopeless_misses(self) -> int:
        """How many drafts in a row brought nothing, if it is hopeless; else 0."""
        return self.misses if self.is_hopeless else 0

    @property
    def drafts(self) -> float:
        """How many drafts were seen, lately."""
        return max(self.reached[0] - self.settings.first_drafts, 0.0)

    def record(
        self, row: RowAcceptance, accepted: int, *, rejected: bool, stopped: bool = False, position: int = 0
    ) -> bool:
        """Takes in one draft of a row.

        Where next to nothing was accepted and one text becomes predictable, others may: what was seen before counts for less,
        so that rows of which one alone would not pay are tried.

        Args:
            row: the row.
            accepted: nodes accepted.
            rejected: whether the node after them was rejected.
            stopped: whether the speculator stopped before it, since it was too unlikely: it counts as rejected.
            position: the output position that the first node was for.

        Returns:
            Whether it made what was seen of the row before count for less.
        """
        settings, keeps = self.settings, self.settings.memory
        first = self.first_at(position)
        if accepted or rejected:
            self._judge(row, first, hit=accepted > 0)
            self.misses = 0 if accepted else self.misses + 1
        changed = row.record(settings, first, accepted, rejected=rejected, stopped=stopped)
        if changed and accepted and self.first < settings.all_change_below:
            self.accepted = [count * settings.change_keeps for count in self.accepted]
            self.reached = [count * settings.change_keeps for count in self.reached]
            self.at_positions = [[count * settings.change_keeps for count in counts] for counts in self.at_positions]
        if accepted or rejected:
            counts = self.at_positions[_range_of(position)]
            counts[0] = counts[0] * keeps + (accepted > 0)
            counts[1] = counts[1] * keeps + 1.0
        for index in range(min(accepted + (rejected or stopped), len(self.reached))):
            self.reached[index] = self.reached[index] * keeps + 1.0
            self.accepted[index] = self.accepted[index] * keeps + (index < accepted)
        return changed

    def _judge(self, row: RowAcceptance, first: float, *, hit: bool) -> None:
        """Compares how well a row's first node is predicted with more or less trust in the other rows.

        Less trust has to predict clearly better: a row's own few drafts are noisy, and following them costs the drafts of
        every row that had bad luck.
        """
        settings = self.settings
        came, accepted, reached = float(hit), row.first_accepted, row.first_reached
        self._losses = losses = [
            loss * settings.memory + (came - (accepted + trust * first) / (reached + trust)) ** 2
            for loss, trust in zip(self._losses, settings.trusts, strict=True)
        ]
        judged = [loss * handicap for loss, handicap in zip(losses, settings.trust_handicaps, strict=True)]
        self.trust = settings.trusts[judged.index(min(judged))]


@attrs.define(eq=False)
class RowAcceptance:
    """What one row has seen of one speculator, the first node of a draft apart from those after it.

    Attributes:
        first_accepted: drafts whose first node was accepted, lately.
        first_reached: drafts.
        rest_accepted: nodes after the first that were accepted.
        rest_reached: nodes after the first that were decided, their ancestors being accepted.
        run: the probability, beforehand, of the present run of drafts with the same result.
        run_accepted: whether they were accepted.
        likeness: how much other rows say about this one: less after its text changed, for a while.
    """

    first_accepted: float = 0.0
    first_reached: float = 0.0
    rest_accepted: float = 0.0
    rest_reached: float = 0.0
    run: float = 1.0
    run_accepted: bool = False
    likeness: float = 1.0

    def record(
        self, settings: AdaptiveSettings, others: float, accepted: int, *, rejected: bool, stopped: bool = False
    ) -> bool:
        """Takes in one draft. A run that was unlikely makes what was seen before count for less: texts change.

        Args:
            settings: how fast it learns.
            others: the probability that a first node is accepted, in any row.
            accepted: nodes accepted.
            rejected: whether the node after them was rejected.
            stopped: whether there was none, though there might have been.

        Returns:
            Whether it made what was seen before count for less.
        """
        hit, changed = accepted > 0, False
        if hit or rejected:
            expected = (self.first_accepted + others) / (self.first_reached + 1.0)
            before = self.run if hit == self.run_accepted else 1.0
            self.run = before * (expected if hit else 1.0 - expected)
            self.run_accepted = hit
            if self.run < settings.change_below:
                changed = True
                self._forget(settings.change_keeps)
            self.likeness += settings.likeness_rate * (1.0 - self.likeness)
            self.first_accepted = self.first_accepted * settings.row_memory + hit
            self.first_reached = self.first_reached * settings.row_memory + 1.0
        reached = accepted - 1 + (rejected or stopped) if accepted else 0
        if reached > 0:
            kept = settings.row_memory ** min(reached, 5)
            self.rest_accepted = self.rest_accepted * kept + accepted - 1
            self.rest_reached = self.rest_reached * kept + reached
        return changed

    def _forget(self, share: float) -> None:
        """The text has changed: keeps a share of what was seen."""
        self.run = 1.0
        self.likeness *= share
        self.first_accepted *= share
        self.first_reached *= share
        self.rest_accepted *= share
        self.rest_reached *= share

    def gains(self, model: AcceptanceModel, depth: int, least: float, position: int) -> list[float]:
        """The probability that each node of a draft is accepted, depth 1 first, as far as it is at least `least`.

        A depth that was not reached lately is assumed to be like the one before it.

        Args:
            model: what was seen of all rows.
            depth: of the deepest node.
            least: the least probability of interest.
            position: the output position that the first node is for.
        """
        accepted, reached, depth_trust = model.accepted, model.reached, model.settings.depth_trust
        trust = max(model.trust * self.likeness, 1.0)
        rate = (self.first_accepted + trust * model.first_at(position)) / (self.first_reached + trust)
        gain, gains = rate, []
        own, seen = self.rest_accepted, self.rest_reached + trust
        for index in range(1, depth + 1):
            if gain < least:
                break
            gains.append(gain)
            if index < depth:
                prior = (accepted[index] + depth_trust * rate) / (reached[index] + depth_trust)
                rate = (own + trust * prior) / seen
                gain *= rate
        return gains


def _range_of(position: int) -> int:
    return min(max(position.bit_length() - 2, 0) // 2, _POSITIONS - 1)
