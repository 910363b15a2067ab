"""How likely the drafts of a speculator are to be accepted, for a row and for its engine. Knows nothing about time."""

from __future__ import annotations

import attrs

_ROW_FORGETS, _ENGINE_FORGETS, _LOSS_FORGETS = 0.94, 0.99, 0.99
_ENGINE_TRUST = 2.0
_FIRST_GUESS, _GUESS_TRUST = 0.6, 3.0
_TRUSTS = (24.0, 6.0, 1.5)
_HANDICAPS = (1.0, 1.05, 1.1)
_DOUBTED_BELOW = 0.5
_MISSES, _HOPEFUL = 8, 0.3
_STRETCHES, _STRETCH_TRUST = 5, 12.0
_STEP_KEEPS = 0.5 ** (1 / 128)
_UNLIKELY, _DOUBT_KEEPS, _DOUBT_FADES = 0.04, 0.3, 0.02


class EngineAcceptance:
    """What all rows together have seen of one speculator: where every new row starts from.

    How much a row's own drafts count against those of all others is learned too: rows may be alike or not.

    Attributes:
        accepted: for each depth (depth 1 first), drafts accepted there, lately.
        reached: drafts whose node there was decided, its ancestors being accepted.
        trust: as how many drafts of a row what is known of all rows counts.
        misses: drafts on end of which nothing was accepted.
        stretches: for each stretch of a text (tokens 0 to 7, to 31, to 127, to 511, all others) the first nodes that were
            accepted there, and drafts: what comes right behind a prompt is not like what follows later.
    """

    def __init__(self, depth: int) -> None:
        self.accepted = [0.0] * depth
        self.reached = [0.0] * depth
        self.accepted[0], self.reached[0] = _FIRST_GUESS * _GUESS_TRUST, _GUESS_TRUST
        self.trust = _TRUSTS[0]
        self.misses = 0
        self.stretches = [[0.0, 0.0] for _ in range(_STRETCHES)]
        self._losses = [0.0] * len(_TRUSTS)

    @property
    def first(self) -> float:
        """The chance that the first node of a draft is accepted."""
        return self.accepted[0] / self.reached[0]

    def first_at(self, position: int) -> float:
        """The same, of drafts for the token at a place of the output."""
        accepted, drafts = self.stretches[_stretch(position)]
        return (accepted + _STRETCH_TRUST * self.first) / (drafts + _STRETCH_TRUST)

    @property
    def is_hopeless(self) -> bool:
        """Whether next to nothing was accepted lately."""
        return self.misses >= _MISSES and self.first < _HOPEFUL

    @property
    def hopeless_misses(self) -> int:
        """How many drafts on end brought nothing, if it is hopeless; else 0."""
        return self.misses if self.is_hopeless else 0

    @property
    def drafts(self) -> float:
        """How many drafts were seen, lately."""
        return max(self.reached[0] - _GUESS_TRUST, 0.0)

    def record(
        self, row: RowAcceptance, accepted: int, *, rejected: bool, stopped: bool = False, position: int = 0
    ) -> bool:
        """Takes in one draft of a row: where, how many nodes were accepted, and whether the one behind them was rejected.

        Where the draft stopped before it, since it was too unlikely, it brings as little as if it had been rejected.

        Where next to nothing was accepted and one text becomes predictable, others may: what was seen before counts for less,
        so that rows of which one alone would not pay are tried.

        Returns:
            Whether it made what was seen of the row before count for less.
        """
        first = self.first_at(position)
        if accepted or rejected:
            self._judge(row, first, hit=accepted > 0)
            self.misses = 0 if accepted else self.misses + 1
        doubts = row.record(first, accepted, rejected=rejected, stopped=stopped)
        if doubts and accepted and self.first < _DOUBTED_BELOW:
            self.accepted = [count * _DOUBT_KEEPS for count in self.accepted]
            self.reached = [count * _DOUBT_KEEPS for count in self.reached]
            self.stretches = [[count * _DOUBT_KEEPS for count in stretch] for stretch in self.stretches]
        if accepted or rejected:
            stretch = self.stretches[_stretch(position)]
            stretch[0] = stretch[0] * _ENGINE_FORGETS + (accepted > 0)
            stretch[1] = stretch[1] * _ENGINE_FORGETS + 1.0
        for index in range(min(accepted + (rejected or stopped), len(self.reached))):
            self.reached[index] = self.reached[index] * _ENGINE_FORGETS + 1.0
            self.accepted[index] = self.accepted[index] * _ENGINE_FORGETS + (index < accepted)
        return doubts

    def _judge(self, row: RowAcceptance, first: float, *, hit: bool) -> None:
        """Compares how well a row's first node is foretold with more or less trust in the other rows.

        Less trust has to foretell clearly better: a row's own few drafts are chance above all, and following them costs the
        drafts of every row that had bad luck.
        """
        came, accepted, reached = float(hit), row.first_accepted, row.first_reached
        self._losses = losses = [
            loss * _LOSS_FORGETS + (came - (accepted + trust * first) / (reached + trust)) ** 2
            for loss, trust in zip(self._losses, _TRUSTS, strict=True)
        ]
        judged = [loss * handicap for loss, handicap in zip(losses, _HANDICAPS, strict=True)]
        self.trust = _TRUSTS[judged.index(min(judged))]


@attrs.define(eq=False)
class RowAcceptance:
    """What one row has seen of one speculator, the first node of a draft apart from those behind it.

    Attributes:
        first_accepted: drafts whose first node was accepted, lately.
        first_reached: drafts.
        rest_accepted: nodes behind the first that were accepted.
        rest_reached: nodes behind the first that were decided, their ancestors being accepted.
        run: how likely the present run of drafts of one kind, accepted or not, was beforehand.
        run_of_hits: its kind.
        likeness: how far other rows are a guide to this one; a text that changed is not like them, for a while.
    """

    first_accepted: float = 0.0
    first_reached: float = 0.0
    rest_accepted: float = 0.0
    rest_reached: float = 0.0
    run: float = 1.0
    run_of_hits: bool = False
    likeness: float = 1.0

    def record(self, others: float, accepted: int, *, rejected: bool, stopped: bool = False) -> bool:
        """Takes in one draft. A run that was unlikely makes what was seen before it count for less: texts change.

        Args:
            others: the chance that a first node is accepted, in any row.
            accepted: nodes accepted.
            rejected: whether the node behind them was rejected.
            stopped: whether there was none, though there might have been.

        Returns:
            Whether it made what was seen before count for less.
        """
        hit, doubts = accepted > 0, False
        if hit or rejected:
            chance = (self.first_accepted + others) / (self.first_reached + 1.0)
            before = self.run if hit == self.run_of_hits else 1.0
            self.run = before * (chance if hit else 1.0 - chance)
            self.run_of_hits = hit
            if self.run < _UNLIKELY:
                doubts = True
                self._doubt()
            self.likeness += _DOUBT_FADES * (1.0 - self.likeness)
            self.first_accepted = self.first_accepted * _ROW_FORGETS + hit
            self.first_reached = self.first_reached * _ROW_FORGETS + 1.0
        reached = accepted - 1 + (rejected or stopped) if accepted else 0
        if reached > 0:
            kept = _ROW_FORGETS ** min(reached, 5)
            self.rest_accepted = self.rest_accepted * kept + accepted - 1
            self.rest_reached = self.rest_reached * kept + reached
        return doubts

    def fade(self, steps: int) -> None:
        """Nothing was drafted for so many steps: texts change, and what was seen says less of what comes now."""
        self._keep(_STEP_KEEPS**steps)

    def _doubt(self) -> None:
        self.run = 1.0
        self.likeness *= _DOUBT_KEEPS
        self._keep(_DOUBT_KEEPS)

    def _keep(self, share: float) -> None:
        self.first_accepted *= share
        self.first_reached *= share
        self.rest_accepted *= share
        self.rest_reached *= share

    def gains(self, engine: EngineAcceptance, depth: int, least: float, position: int) -> list[float]:
        """The chance that each node of a draft is accepted, depth 1 first, as far as it is at least `least`.

        A depth that was not reached lately is taken to be like the one before it.

        Args:
            engine: what was seen of all rows.
            depth: of the deepest node.
            least: the least chance of interest.
            position: the place in the output that the first node is for.
        """
        accepted, reached = engine.accepted, engine.reached
        trust = max(engine.trust * self.likeness, 1.0)
        rate = (self.first_accepted + trust * engine.first_at(position)) / (self.first_reached + trust)
        gain, gains = rate, []
        own, seen = self.rest_accepted, self.rest_reached + trust
        for index in range(1, depth + 1):
            if gain < least:
                break
            gains.append(gain)
            if index < depth:
                prior = (accepted[index] + _ENGINE_TRUST * rate) / (reached[index] + _ENGINE_TRUST)
                rate = (own + trust * prior) / seen
                gain *= rate
        return gains


def _stretch(position: int) -> int:
    return min(max(position.bit_length() - 2, 0) // 2, _STRETCHES - 1)
