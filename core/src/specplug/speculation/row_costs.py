"""How long something takes for every number of rows: a target step, or one speculator's proposal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from specplug.speculation.curve import CostCurve

_OTHERS_COUNT = 0.25


class RowCosts(Mapping[int, CostCurve]):
    """A curve of seconds over sizes for each class of numbers of rows.

    Batches fill and empty: numbers of rows that were hardly seen yet are taken to be like the nearest that was.

    Args:
        make: makes a curve of which nothing is known.
    """

    def __init__(self, make: Callable[[], CostCurve]) -> None:
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
        curve = curves.get(rows_class(rows))
        if curve is None and curves:
            curve = curves[min(curves, key=lambda known: abs(known - rows))]
        return curve

    def count(self, rows: int) -> int:
        """How many timings there were of so many rows; others count for a quarter."""
        own = self._curves.get(rows_class(rows))
        timed = 0 if own is None else own.count
        return timed + int(_OTHERS_COUNT * (sum(curve.count for curve in self._curves.values()) - timed))

    def observe(self, rows: int, size: int, seconds: float) -> None:
        """Takes in a timing."""
        key = rows_class(rows)
        if key not in self._curves:
            nearest = self.of(rows)
            self._curves[key] = self._make() if nearest is None else nearest.begin_another()
        self._curves[key].observe(size, seconds)


def rows_class(rows: int) -> int:
    """Numbers of rows whose timings are kept together, named by the largest of them."""
    if rows <= 4:
        return rows
    step = 1 << ((rows - 1).bit_length() - 2)
    return -(-rows // step) * step
