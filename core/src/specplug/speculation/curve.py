"""Learning, from noisy timings, how long something takes as a function of its size. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

_FAST = 0.1
"""The share of a surprise that goes to the level at once, for all sizes; what goes to the size's own shape falls with the
number of timings, since a shape that keeps following the noise of one size walks away from the others."""
_MOST = 256.0
_SPIKE = 3.0
_FORGET = 0.999
_REBUILD_EVERY, _SETTLED_EVERY, _SETTLED = 8, 32, 64
_SMALLEST_TABLE = 16
_MOST_WAITING = 16
_FINE = 0.03
"""Differences in shape of this share are worth telling apart: of sizes seen too rarely for that the line is believed."""
_STEEP = 0.015
_FINEST = 16
_LENT, _LEVEL_AFTER = 4.0, 8
"""As how many timings counts the shape of something similar; of the level the first timings are averaged then."""


@attrs.define
class _Cell:
    """What was seen of sizes that count as one: their mean size and mean shape, and how many there were, lately."""

    size: float
    shape: float
    weight: float = 1.0


class CostCurve:
    """Seconds as a function of a size, from timings that jitter, spike and drift.

    A *level*, common to all sizes, follows the clock quickly: contexts grow, machines slow down. The *shape* relative to it is
    learned slowly, per size up to 16 and in cells of an eighth above, and pulled towards a straight line through all of them,
    which also answers for sizes that were never seen. Seconds never fall with the size. Old timings fade, so that a size that
    was avoided because of a few slow moments is tried again.

    Args:
        slope: the line's slope before anything is known, as a share of the seconds at size 0 (or, `proportional`, ignored).
        proportional: whether, before two sizes were seen, seconds are taken to grow in proportion to the size.
        least_slope: the least that one more costs, as a share of the seconds at the smallest size.
    """

    def __init__(self, slope: float = 0.0, *, proportional: bool = False, least_slope: float = 0.0) -> None:
        self._count = 0
        self._slope = slope
        self._proportional = proportional
        self._least_slope = least_slope
        self._level = 0.0
        self._cells: dict[int, _Cell] = {}
        self._shapes: list[float] = []
        self._length = _SMALLEST_TABLE
        self._stale = 0
        self._noise = 0.01
        self._until_level = 0
        self._waiting: list[tuple[int, float]] = []

    def begin_another(self) -> CostCurve:
        """A curve of something like this: of the same shape until it is known better, at a level of its own."""
        if self._waiting:
            self._take_in()
        other = CostCurve(self._slope, proportional=self._proportional, least_slope=self._least_slope)
        other._cells = {key: _Cell(cell.size, cell.shape, min(cell.weight, _LENT)) for key, cell in self._cells.items()}
        other._until_level = _LEVEL_AFTER
        return other

    @property
    def count(self) -> int:
        """How many timings there were."""
        return self._count + len(self._waiting)

    def seconds(self, size: int) -> float:
        """The expected time."""
        if self._waiting:
            self._take_in()
        try:
            return self._level * self._shapes[size]
        except IndexError:
            return self._level * self._shape(size)

    def shapes(self, largest: int) -> tuple[Sequence[float], float]:
        """The expected times of all sizes up to `largest` at least, over a level; and that level. They are not copied."""
        if self._waiting:
            self._take_in()
        self._shape(largest)
        return self._shapes, self._level

    def table(self, begin: int, end: int) -> list[float]:
        """The expected times of sizes from `begin` to before `end`."""
        if self._waiting:
            self._take_in()
        self._shape(end - 1)
        level = self._level
        return [level * shape for shape in self._shapes[begin:end]]

    def observe(self, size: int, seconds: float) -> None:
        """Notes one timing. It is taken in with others when a time is asked for: one by one each would find cold caches."""
        self._waiting.append((size, seconds))
        if len(self._waiting) >= _MOST_WAITING:
            self._take_in()

    def _take_in(self) -> None:
        waiting, self._waiting = self._waiting, []
        for size, seconds in waiting:
            self._learn(size, seconds)

    def _learn(self, size: int, seconds: float) -> None:
        self._count += 1
        if self._level <= 0.0:
            if not self._cells:
                self._cells[_cell_of(size)] = _Cell(size, 1.0)
            self._shapes = []
            self._level = max(seconds, 1e-9) / self._shape(size)
            return
        key = _cell_of(size)
        cell, shape = self._cells.get(key), self._shape(size)
        surprise = max(seconds, 1e-9) / (self._level * shape)
        if cell is None and surprise > _SPIKE:
            self._cells[key] = _Cell(size, shape, 0.05)  # a cold shape; the next one counts
            return
        if self._count < 8 and surprise < 0.5:
            self._level *= surprise  # what came first was cold
            return
        surprise = 0.6 if surprise < 0.6 else 1.6 if surprise > 1.6 else surprise
        beyond = surprise - 1.0
        self._noise += 0.03 * (beyond * beyond - self._noise)
        if cell is None:
            self._cells[key] = _Cell(size, shape * surprise)
            self._stale = _SETTLED_EVERY
        else:
            known = cell.weight
            fast = 1.0 / self._count if self._count <= self._until_level else _FAST * known / (known + 3.0)
            self._level *= 1.0 + fast * beyond
            cell.weight = known + 1.0 if known < _MOST - 1.0 else _MOST
            share = 1.0 / (cell.weight + 1.0)
            cell.shape *= 1.0 + share * beyond
            cell.size += share * (size - cell.size)
        self._stale += 1
        if self._stale >= (_REBUILD_EVERY if self._count < _SETTLED else _SETTLED_EVERY):
            for each in self._cells.values():
                each.weight *= _FORGET**self._stale
            self._stale = 0
            self._shapes = []

    def _shape(self, size: int) -> float:
        try:
            return self._shapes[size]
        except IndexError:
            self._build(size)
            return self._shapes[size]

    def _build(self, size: int) -> None:
        """Works out the shapes of all sizes up to this and well beyond."""
        while size >= self._length:
            self._length *= 2
        largest = self._length - 1
        cells = sorted(self._cells.values(), key=lambda cell: cell.size)
        if not cells:
            self._shapes = [1.0] * self._length
            return
        origin, slope = self._line(cells)
        doubt = 1.0 + self._noise / _FINE**2
        rests = [
            (cell.size, (cell.shape - origin - slope * cell.size) * cell.weight / (cell.weight + doubt))
            for cell in cells
        ]
        least = self._least_slope * max(origin, 1e-12)
        shapes: list[float] = []
        index, floor = 0, 0.0
        for size in range(largest + 1):
            while index < len(rests) and rests[index][0] < size:
                index += 1
            if index == 0:
                rest = rests[0][1]
            elif index == len(rests):
                rest = rests[-1][1]
            else:
                (low, before), (high, after) = rests[index - 1], rests[index]
                rest = before + (after - before) * (size - low) / (high - low)
            floor = max(origin + slope * size + rest, floor + least if shapes else 1e-9)
            shapes.append(floor)
        self._shapes = shapes

    def _line(self, cells: list[_Cell]) -> tuple[float, float]:
        """(shape at size 0, slope) of the line nearest to all cells, and to what was expected beforehand."""
        weights = [cell.weight for cell in cells]
        total = sum(weights)
        size = sum(w * cell.size for w, cell in zip(weights, cells, strict=True)) / total
        shape = sum(w * cell.shape for w, cell in zip(weights, cells, strict=True)) / total
        if self._proportional:
            expected, belief = shape / max(size, 1.0), 1.0
        else:
            expected, belief = shape * self._slope / (1.0 + self._slope * size), 1.0 + self._noise / _STEEP**2
        spread = sum(w * (cell.size - size) ** 2 for w, cell in zip(weights, cells, strict=True))
        both = sum(w * (cell.size - size) * (cell.shape - shape) for w, cell in zip(weights, cells, strict=True))
        slope = (both + belief * expected) / (spread + belief)
        slope = min(max(slope, 0.0), shape / size) if size > 0 else max(slope, 0.0)
        return max(shape - slope * size, 0.0), slope


def _cell_of(size: int) -> int:
    """Sizes with one number share a cell."""
    if size <= _FINEST:
        return size
    step = 1 << (size.bit_length() - 4)
    return size // step * step
