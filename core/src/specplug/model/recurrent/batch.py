"""A forward's rows as the layers with recurrent state see them: index tensors that all of these layers share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import attrs
import numpy as np
import torch

from specplug.model.device import to_device


@attrs.frozen(eq=False)
class StateRow:
    """One row.

    Attributes:
        slot: of its state.
        is_fresh: whether its state is that before the first token.
        first: the packed index of its first token.
        count: its new tokens.
        replayed: entries over which its state is brought forward before the new tokens, in order.
        remaining: the entries after these that are kept.
        passed: new tokens over which its state is brought forward; the others become entries.
        ancestors: bool [entries, entries], if the new tokens are a tree: which of them come before each, itself included.
    """

    slot: int
    is_fresh: bool
    first: int
    count: int
    replayed: Sequence[int]
    remaining: Sequence[int]
    passed: int
    ancestors: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Entries after the forward."""
        return len(self.remaining) + self.count - self.passed


class Slots:
    """Some rows' part of a tensor: a view where their slots follow each other, else a copy."""

    def __init__(self, slots: Sequence[int], device: torch.device) -> None:
        begin, count = slots[0], len(slots)
        self._slice = slice(begin, begin + count) if list(slots) == list(range(begin, begin + count)) else None
        self._index = None if self._slice else to_device(list(slots), device)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows [R, ...]."""
        return tensor[self._slice] if self._index is None else tensor.index_select(0, self._index)

    def write(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Stores rows; those that `read` gave as a view and that were changed in place are stored already."""
        if self._index is not None:
            tensor.index_copy_(0, self._index, values)
        elif tensor[self._slice].data_ptr() != values.data_ptr():
            tensor[self._slice].copy_(values)

    def write_first(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Stores the first entries [R, W, ...] of rows."""
        if self._index is not None:
            tensor[:, : values.shape[1]].index_copy_(0, self._index, values)
        else:
            tensor[self._slice, : values.shape[1]] = values


@attrs.frozen(eq=False)
class Replay:
    """The rows whose states are brought forward before the new tokens.

    Attributes:
        slots: the rows.
        entries: int64 [R * M], into the rows' entries [R, held] as one list; padding repeats a row's first one.
        valid: bool [R, M].
    """

    slots: Slots
    entries: torch.Tensor
    valid: torch.Tensor

    def gather(self, entries: torch.Tensor) -> torch.Tensor:
        """[R, M, ...] of entries [slots, held, ...]."""
        read = self.slots.read(entries).flatten(0, 1)
        return read.index_select(0, self.entries).unflatten(0, self.valid.shape)


@attrs.frozen(eq=False)
class Window:
    """The rows' entries after the forward, R rows of at most W: those that remain, then the new tokens.

    Attributes:
        slots: the rows.
        packed: int64 [R * W], the packed index of each new token; elsewhere that of the row's first one.
        valid: bool [R, W].
        ancestors: bool [R, W, W]: which entries come before each one, itself included.
        stored: int64 [R * W], into the rows' stored entries as one list; None where no row has any that remain.
        is_stored: bool [R, W].
        lanes: int64, the places in R * W of the new tokens, in packed order; None where they are all of them.
        targets: int64, the packed indices of the same; None where they are 0, 1, 2, …
    """

    slots: Slots
    packed: torch.Tensor
    valid: torch.Tensor
    ancestors: torch.Tensor
    stored: torch.Tensor | None
    is_stored: torch.Tensor
    lanes: torch.Tensor | None
    targets: torch.Tensor | None

    @property
    def width(self) -> int:
        """W."""
        return self.valid.shape[1]

    @cached_property
    def has_branches(self) -> bool:
        """Whether any row's entries are not a chain."""
        chain = torch.ones(self.width, self.width, dtype=torch.bool, device=self.valid.device).tril()
        each = self.valid[:, :, None] & self.valid[:, None, :]
        return bool((self.ancestors != chain)[each.expand_as(self.ancestors)].any())

    @cached_property
    def parents(self) -> torch.Tensor:
        """int64 [R, W]: the entry before each one; -1 for the first."""
        places = torch.arange(self.width, dtype=torch.long, device=self.valid.device)
        before = self.ancestors & (places[:, None] > places)
        return torch.where(before, places, -1).amax(-1)

    def gather(self, packed: torch.Tensor) -> torch.Tensor:
        """[R, W, ...] of the new tokens' values [T, ...]."""
        return packed.index_select(0, self.packed).unflatten(0, self.valid.shape)

    def mix(self, new: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """[R, W, ...]: stored entries [slots, held, ...] where these remain, the new tokens' elsewhere."""
        if self.stored is None:
            return new
        old = self.slots.read(entries).flatten(0, 1).index_select(0, self.stored).unflatten(0, self.valid.shape)
        return torch.where(self.is_stored.view(*self.valid.shape, *[1] * (new.dim() - 2)), old, new)

    def scatter(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the new tokens' results [R, W, ...] to where they are packed, [T, ...]."""
        flat = values.flatten(0, 1)
        if self.lanes is not None:
            flat = flat.index_select(0, self.lanes)
        if self.targets is None:
            out.copy_(flat)
        else:
            out.index_copy_(0, self.targets, flat.to(out.dtype))


class StateBatch:
    """The rows of one forward.

    Args:
        rows: the rows, in packed order.
        held: the most entries of a row.
        device: of the model.
        is_native: whether kernels run them, where there is one.
    """

    def __init__(self, rows: Sequence[StateRow], held: int, device: torch.device, *, is_native: bool = False) -> None:
        self.rows = rows
        self.is_native = is_native
        self._held = held
        self._device = device
        self._taps: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def slots(self) -> Slots:
        """Of all rows."""
        return Slots([row.slot for row in self.rows], self._device)

    @cached_property
    def plan(self) -> torch.Tensor:
        """int32: the rows as kernels read them (see `native/cpu/recurrent/state_rows.h`)."""
        numbers = [len(self.rows)]
        for row in self.rows:
            sizes = (row.count, row.passed, len(row.replayed), len(row.remaining), row.ancestors is not None)
            numbers += [row.slot, row.is_fresh, row.first, *sizes, *row.replayed, *row.remaining]
            if row.ancestors is not None:
                numbers += _parents(row.ancestors).tolist()
        return self._tensor(np.array(numbers, dtype=np.int32))

    @cached_property
    def fresh(self) -> torch.Tensor | None:
        """int64: slots whose states begin as zeros. They are filled, not multiplied: a failed row may have left NaN."""
        slots = [row.slot for row in self.rows if row.is_fresh]
        return to_device(slots, self._device) if slots else None

    @cached_property
    def replay(self) -> Replay | None:
        """The rows whose states are brought forward before the new tokens."""
        rows = [row for row in self.rows if row.replayed]
        if not rows:
            return None
        most = max(len(row.replayed) for row in rows)
        entries = np.zeros((len(rows), most), dtype=np.int64)
        valid = np.zeros((len(rows), most), dtype=np.bool_)
        for place, row in enumerate(rows):
            count = len(row.replayed)
            entries[place] = place * self._held + row.replayed[0]
            entries[place, :count] = place * self._held + np.asarray(row.replayed)
            valid[place, :count] = True
        return Replay(
            Slots([row.slot for row in rows], self._device), self._tensor(entries.ravel()), self._tensor(valid)
        )

    @property
    def prefixes(self) -> list[tuple[int, int, int]]:
        """(slot, packed index of the first token, number) of new tokens over which states are brought forward."""
        return [(row.slot, row.first, row.first + row.passed) for row in self.rows if row.passed]

    @cached_property
    def window(self) -> Window | None:
        """The rows' entries after the forward."""
        rows = [row for row in self.rows if row.width]
        if not rows:
            return None
        shape = (len(rows), max(row.width for row in rows))
        packed, stored = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        valid, is_stored = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
        ancestors = np.zeros((*shape, shape[1]), dtype=np.bool_)
        ancestors[:, range(shape[1]), range(shape[1])] = True
        lanes: list[int] = []
        targets: list[int] = []
        for place, row in enumerate(rows):
            begin, end, first = len(row.remaining), row.width, row.first + row.passed
            valid[place, :end] = True
            packed[place] = first
            packed[place, begin:end] = range(first, row.first + row.count)
            stored[place] = place * self._held
            stored[place, :begin] += np.asarray(row.remaining, dtype=np.int64)
            is_stored[place, :begin] = True
            ancestors[place, :end, :end] = np.tri(end, dtype=np.bool_) if row.ancestors is None else row.ancestors
            lanes += range(place * shape[1] + begin, place * shape[1] + end)
            targets += range(first, row.first + row.count)
        everything = sum(row.count for row in self.rows)
        return Window(
            slots=Slots([row.slot for row in rows], self._device),
            packed=self._tensor(packed.ravel()),
            valid=self._tensor(valid),
            ancestors=self._tensor(ancestors),
            stored=self._tensor(stored.ravel()) if is_stored.any() else None,
            is_stored=self._tensor(is_stored),
            lanes=None if len(lanes) == valid.size else to_device(lanes, self._device),
            targets=None if len(targets) == everything else to_device(targets, self._device),
        )

    def taps(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a convolution finds the inputs of each token, and of each row's buffer after the forward.

        Both are indices into all rows' buffers [R, width - 1 + held] as one list, followed by the packed batch.

        Args:
            width: of the filter.

        Returns:
            int64 [width, T], the oldest input first; int64 [R, width - 1 + held].
        """
        if width not in self._taps:
            size = width - 1 + self._held
            taps, following = [], np.zeros((len(self.rows), size), dtype=np.int64)
            packed = len(self.rows) * size
            for place, row in enumerate(self.rows):
                begin = place * size
                past = [*range(width - 1), *(width - 1 + entry for entry in (*row.replayed, *row.remaining))]
                sources = np.concatenate(
                    [begin + np.asarray(past, dtype=np.int64), packed + row.first + np.arange(row.count)]
                )
                taps.append(sources[_ancestries(row, len(past), width)])
                state_end = width - 1 + len(row.replayed) + row.passed
                last = sources[state_end - (width - 1) :]
                following[place] = begin
                following[place, : len(last)] = last
            self._taps[width] = self._tensor(np.concatenate(taps, axis=1)), self._tensor(following)
        return self._taps[width]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _ancestries(row: StateRow, past: int, width: int) -> np.ndarray:
    """int64 [width, tokens]: each new token and the tokens before it, the oldest first, among the past and the new ones."""
    total = past + row.count
    current = np.arange(past, total)
    if row.ancestors is None:
        return current - np.arange(width - 1, -1, -1)[:, None]
    before = np.arange(-1, total - 1)
    before[past:] = past + _parents(row.ancestors)
    steps = [current]
    for _ in range(width - 1):
        steps.append(before[steps[-1]])
    return np.stack(steps[::-1])


def _parents(ancestors: np.ndarray) -> np.ndarray:
    """int64 [tokens]: the token before each one in a tree; -1 for none."""
    strict = ancestors & ~np.eye(len(ancestors), dtype=np.bool_)
    return np.where(strict.any(axis=1), len(strict) - 1 - strict[:, ::-1].argmax(axis=1), -1)
