"""A row's tokens in an array of its host, as plugins see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

from specplug.contract.types import TokenView


class ArrayTokens(TokenView):
    """The first `length` integers of an array, which is not copied; slices are copies, as lists.

    The host may write to the array and move the row to another one between two calls of `propose`. A speculator that
    `learns` reads a row's tokens when it has ended: until that was delivered, the array must hold them.

    Args:
        array: one-dimensional integers: a numpy array, an `array.array` or a CPU tensor.
        length: how many of them are committed.
    """

    __slots__ = ("_array", "length")

    def __init__(self, array: Any, length: int) -> None:
        self._array = array
        self.length = length

    def point_to(self, array: Any, length: int) -> None:
        """Moves the view to another array, or makes it longer."""
        self._array = array
        self.length = length

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self.length)
            if step < 0:
                return self._list(0, self.length)[index]
            values = self._list(start, stop)
            return values if step == 1 else values[::step]
        at = index + self.length if index < 0 else index
        if not 0 <= at < self.length:
            raise IndexError(f"token {index} of a row of {self.length}")
        return int(self._array[at])

    def _list(self, start: int, stop: int) -> list[int]:
        values: list[int] = self._array[start : max(start, stop)].tolist()
        return values

    def __iter__(self) -> Iterator[int]:
        return iter(self._list(0, self.length))

    def __repr__(self) -> str:
        return f"ArrayTokens({self._list(0, self.length)!r})"
