"""How long something takes by rows and size, learned from noisy timings. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs

from specplug.speculation.adaptive.settings import AdaptiveSettings

_SMALLEST_TABLE = 16
_FINEST = 16
_REBUILD_EVERY, _REBUILD_LATER, _LATER = 8, 32, 64


@attrs.define
class _Cell:
    """Timings of sizes that are kept together: their mean size and mean shape, and how many count."""

    size: float
    shape: float
    weight: float = 1.0


class CostCurve:
    """Seconds over a size: `level × shape(size)`, from timings that are noisy and drift.

    The *level*, common to all sizes, follows the clock quickly: contexts grow, machines slow down. The *shape* is learned
    slowly, per size up to 16 and in cells of an eighth above, and pulled towards a straight line through all of them, which
    also answers for sizes that were never seen. Seconds never fall with the size. Old timings fade, so that a size that was
    avoided because of a few slow moments is tried again.

    Of a target, size 0 is *apart* where size 1 costs a jump: verifying any draft may take another path (another kernel, no
    captured graph). Without a jump size 0 is on the line like any other, which is less noisy.

    Args:
        settings: how fast it learns.
        slope: the assumed slope before anything is known, as a share of the seconds at size 0; or, `proportional`, ignored.
        proportional: whether, before two sizes were seen, seconds are assumed to grow in proportion to the size.
        least_slope: the least that one more costs, as a share of the seconds at size 0.
        zero_is_apart: whether sizes above 0 may cost a jump.
    """

    def __init__(
        self,
        settings: AdaptiveSettings,
        slope: float = 0.0,
        *,
        proportional: bool = False,
        least_slope: float = 0.0,
        zero_is_apart: bool = False,
    ) -> None:
        self._settings = settings
        self._count = 0
        self._slope = slope
        self._proportional = proportional
        self._least_slope = least_slope
        self._zero_is_apart = zero_is_apart
        self._level = 0.0
        self._cells: dict[int, _Cell] = {}
        self._shapes: list[float] = []
        self._length = _SMALLEST_TABLE
        self._stale = 0
        self._noise = 0.01
        self._until_level = 0

    def borrow(self) -> CostCurve:
        """A curve for something similar: of the same shape until it is known better, at a level of its own."""
        settings = self._settings
        other = self._new()
        other._cells = {
            key: _Cell(cell.size, cell.shape, min(cell.weight, settings.borrowed_weight))
            for key, cell in self._cells.items()
        }
        other._until_level = settings.borrowed_level_timings
        return other

    def _new(self) -> CostCurve:
        return CostCurve(
            self._settings,
            self._slope,
            proportional=self._proportional,
            least_slope=self._least_slope,
            zero_is_apart=self._zero_is_apart,
        )

    @property
    def count(self) -> int:
        """How many timings there were."""
        return self._count

    def seconds(self, size: int) -> float:
        """The expected time."""
        try:
            return self._level * self._shapes[size]
        except IndexError:
            return self._level * self._shape(size)

    def shapes(self, largest: int) -> tuple[Sequence[float], float]:
        """The expected times of all sizes up to `largest` at least, over a level; and that level. They are not copied."""
        self._shape(largest)
        return self._shapes, self._level

    def table(self, begin: int, end: int) -> list[float]:
        """The expected times of sizes from `begin` to before `end`."""
        self._shape(end - 1)
        level = self._level
        return [level * shape for shape in self._shapes[begin:end]]

    def observe(self, size: int, seconds: float) -> None:
        """Takes in one timing."""
        seconds = max(seconds, 1e-9)
        self._count += 1
        if self._level <= 0.0:
            if not self._cells:
                self._cells[_cell_of(size)] = _Cell(size, 1.0)
            self._shapes = []
            self._level = seconds / self._shape(size)
            return
        settings, key = self._settings, _cell_of(size)
        cell, shape = self._cells.get(key), self._shape(size)
        surprise = seconds / (self._level * shape)
        if self._count < 8 and surprise < 0.5:
            self._level *= surprise  # what came first was cold
            return
        beyond = min(max(surprise, settings.fastest_surprise), settings.slowest_surprise) - 1.0
        self._noise += settings.noise_rate * (beyond * beyond - self._noise)
        if cell is None:
            self._cells[key] = _Cell(size, shape * (1.0 + beyond))
            self._stale = _REBUILD_LATER
        else:
            known = cell.weight
            fast = (
                1.0 / self._count if self._count <= self._until_level else settings.level_rate * known / (known + 3.0)
            )
            self._level *= 1.0 + fast * beyond
            cell.weight = min(known + 1.0, settings.max_weight)
            share = 1.0 / (cell.weight + 1.0)
            cell.shape *= 1.0 + share * beyond
            cell.size += share * (size - cell.size)
        self._stale += 1
        if self._stale >= (_REBUILD_EVERY if self._count < _LATER else _REBUILD_LATER):
            for each in self._cells.values():
                each.weight *= settings.cost_memory**self._stale
            self._stale = 0
            self._shapes = []

    def _shape(self, size: int) -> float:
        if size >= len(self._shapes):
            self._build(size)
        return self._shapes[size]

    def _build(self, size: int) -> None:
        """Works out the shapes of all sizes up to this and well beyond."""
        while size >= self._length:
            self._length *= 2
        cells = sorted(self._cells.values(), key=lambda cell: cell.size)
        if not cells:
            self._shapes = [1.0] * self._length
            return
        shapes = self._table(cells)
        if self._zero_is_apart and len(cells) > 1 and 0 in self._cells:
            apart, plain = self._table(cells[1:]), cells[0].shape
            if apart[1] > (1.0 + self._settings.least_jump) * plain:
                shapes = [plain, *apart[1:]]
        least = self._least_slope * max(shapes[0], 1e-12)
        self._shapes = []
        floor = 1e-9 - least
        for shape in shapes:
            floor = max(shape, floor + least)
            self._shapes.append(floor)

    def _table(self, cells: list[_Cell]) -> list[float]:
        """The shapes of all sizes by some cells: their line, and each cell's own deviation as far as it is believed."""
        origin, slope = self._line(cells)
        doubt = 1.0 + self._noise / self._settings.fine**2
        rests = [
            (cell.size, (cell.shape - origin - slope * cell.size) * cell.weight / (cell.weight + doubt))
            for cell in cells
        ]
        shapes = []
        index = 0
        for size in range(self._length):
            while index < len(rests) and rests[index][0] < size:
                index += 1
            if index == 0:
                rest = rests[0][1]
            elif index == len(rests):
                rest = rests[-1][1]
            else:
                (low, before), (high, after) = rests[index - 1], rests[index]
                rest = before + (after - before) * (size - low) / (high - low)
            shapes.append(origin + slope * size + rest)
        return shapes

    def _line(self, cells: list[_Cell]) -> tuple[float, float]:
        """(shape at size 0, slope) of the line nearest to all cells, and to what was assumed."""
        weights = [cell.weight for cell in cells]
        total = sum(weights)
        size = sum(w * cell.size for w, cell in zip(weights, cells, strict=True)) / total
        shape = sum(w * cell.shape for w, cell in zip(weights, cells, strict=True)) / total
        if self._proportional:
            expected, belief = shape / max(size, 1.0), 1.0
        else:
            expected = shape * self._slope / (1.0 + self._slope * size)
            belief = 1.0 + self._noise / self._settings.steep**2
        spread = sum(w * (cell.size - size) ** 2 for w, cell in zip(weights, cells, strict=True))
        both = sum(w * (cell.size - size) * (cell.shape - shape) for w, cell in zip(weights, cells, strict=True))
        slope = (both + belief * expected) / (spread + belief)
        slope = min(max(slope, 0.0), shape / size) if size > 0 else max(slope, 0.0)
        return max(shape - slope * size, 0.0), slope


class CostModel(Mapping[int, CostCurve]):
    """A curve of seconds over sizes for each class of numbers of rows: of a target step, or of one speculator's proposal.

    Batches fill and empty: numbers of rows that were hardly seen yet are assumed to be like the nearest that was.

    Args:
        settings: how fast it learns.
        make: makes a curve of which nothing is known.
    """

    def __init__(self, settings: AdaptiveSettings, make: Callable[[], CostCurve]) -> None:
        self._settings = settings
        self._make = make
        self._curves: dict[int, CostCurve] = {}

    def __getitem__(self, key: int) -> CostCurve:
        return self._curves[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._curves)

    def __len__(self) -> int:
        return len(self._curves)

    def of(self, rows: int) -> CostCurve | None:
        """The curve for so many rows, or for about as many; None if nothing is known."""
        curves = self._curves
        curve = curves.get(_class_of(rows))
        if curve is None and curves:
            curve = curves[min(curves, key=lambda known: abs(known - rows))]
        return curve

    def count(self, rows: int) -> int:
        """How many timings there were of so many rows; others count for less."""
        own = self._curves.get(_class_of(rows))
        timed = 0 if own is None else own.count
        others = sum(curve.count for curve in self._curves.values()) - timed
        return timed + int(self._settings.other_rows_count * others)

    def observe(self, rows: int, size: int, seconds: float) -> None:
        """Takes in a timing."""
        key = _class_of(rows)
        if key not in self._curves:
            nearest = self.of(rows)
            self._curves[key] = self._make() if nearest is None else nearest.borrow()
        self._curves[key].observe(size, seconds)


def target_costs(settings: AdaptiveSettings) -> CostModel:
    """Seconds of target steps over their draft nodes, before anything is known."""
    return CostModel(settings, lambda: target_curve(settings))


def target_curve(settings: AdaptiveSettings) -> CostCurve:
    """Seconds of target steps with some number of rows, before anything is known."""
    return CostCurve(settings, settings.verify_slope, least_slope=settings.least_slope, zero_is_apart=True)


def _cell_of(size: int) -> int:
    """Sizes with one number share a cell."""
    if size <= _FINEST:
        return size
    step = 1 << (size.bit_length() - 4)
    return size // step * step


def _class_of(rows: int) -> int:
    """Numbers of rows whose timings are kept together, named by the largest of them."""
    if rows <= 4:
        return rows
    step = 1 << ((rows - 1).bit_length() - 2)
    return -(-rows // step) * step
