"""The last target states of rows that sleep, kept until their speculators wake."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import attrs
import torch

from specplug.contract.traits import Boundary
from specplug.model.device import to_device

WINDOW = 64
Channel = Boundary | str
Captured = Mapping[Channel, torch.Tensor]
StepRows = Mapping[int, tuple[range, list[int]]]
"""Slot → (positions that became final, where they lie in the packed batch)."""


@attrs.frozen
class ChannelSpec:
    """Width and dtype of one channel."""

    width: int
    dtype: torch.dtype


@attrs.frozen(eq=False)
class _HeldStep:
    captured: Captured
    rows: StepRows
    slots: Sequence[int]
    tokens: int


class StateRing:
    """For every slot the states of its last `WINDOW` positions, in a ring.

    Small steps' tensors are held as they came, and sorted into the ring when a slot's states are needed or there are too many:
    where rows sleep, that is one step in 32. A GPU's lie where the next step writes its own, and are sorted at once.

    Args:
        specs: the channels.
        max_num_seqs: slots.
        device: where states live.
    """

    def __init__(self, specs: Mapping[Channel, ChannelSpec], max_num_seqs: int, device: torch.device) -> None:
        self.buffers = {
            channel: torch.zeros(max_num_seqs * WINDOW, spec.width, dtype=spec.dtype, device=device)
            for channel, spec in specs.items()
        }
        self._specs = specs
        self._oldest: dict[int, int] = {}  # slot → first position kept
        self._limit = _held_tokens(max_num_seqs, device)
        self._held: list[_HeldStep] = []
        self._held_tokens = 0
        self._first_held: dict[int, int] = {}  # slot → the first held step that is its own

    @staticmethod
    def held_positions(max_num_seqs: int, device: torch.device) -> int:
        """Positions whose states can exist beside the ring: held, and put together to be sorted."""
        return 2 * _held_tokens(max_num_seqs, device)

    @staticmethod
    def place(slot: int, position: int) -> int:
        """Where a position lies in the buffers."""
        return slot * WINDOW + position % WINDOW

    def keep(self, captured: Captured, rows: StepRows, slots: Sequence[int]) -> None:
        """Keeps a step's states of some slots; its tensors may be held."""
        if not slots or not self._specs:
            return
        tokens = len(captured[next(iter(self._specs))])
        if self._held_tokens + tokens > self._limit:
            self._sort()
        for slot in slots:
            self._first_held.setdefault(slot, len(self._held))
        self._held.append(_HeldStep(captured, rows, slots, tokens))
        self._held_tokens += tokens
        if tokens > self._limit:
            self._sort()

    def oldest(self, slot: int) -> int | None:
        """The first position whose states are in the buffers, with all behind it; None if nothing was kept."""
        if slot in self._first_held:
            self._sort()
        return self._oldest.get(slot)

    def drop(self, slot: int) -> None:
        """Forgets a slot."""
        self._first_held.pop(slot, None)
        self._oldest.pop(slot, None)
        if not self._first_held:
            self._held, self._held_tokens = [], 0

    def _sort(self) -> None:
        held, self._held, self._held_tokens = self._held, [], 0
        first_held, self._first_held = self._first_held, {}
        places: dict[int, int] = {}  # later steps overwrite earlier ones
        spans: dict[int, tuple[int, int]] = {}
        begin = 0
        for number, step in enumerate(held):
            for slot in step.slots:
                row = step.rows.get(slot)
                if row is None or number < first_held.get(slot, len(held)):
                    continue
                positions, packed = row
                for position, place in zip(positions, packed, strict=True):
                    places[slot * WINDOW + position % WINDOW] = begin + place
                spans[slot] = spans[slot][0] if slot in spans else positions.start, positions.stop
            begin += step.tokens
        for slot, (start, stop) in spans.items():
            self._oldest[slot] = max(self._oldest.get(slot, start), stop - WINDOW)
        if not places:
            return
        captured = held[0].captured
        if len(held) > 1:
            captured = {channel: torch.cat([step.captured[channel] for step in held]) for channel in self._specs}
        copy_states(self._specs, captured, list(places.values()), self.buffers, list(places))


def _held_tokens(max_num_seqs: int, device: torch.device) -> int:
    """Tokens of the steps that are held at most."""
    return 32 * max_num_seqs if device.type == "cpu" else 0


def copy_states(
    specs: Mapping[Channel, ChannelSpec], source: Captured, read: list[int], destination: Captured, write: list[int]
) -> None:
    """Copies the states at some places to others, in all channels."""
    if not read:
        return
    if _is_run(read) and _is_run(write):  # a slice takes a third of the time of an index, and one row is the usual case
        first, to, count = read[0], write[0], len(read)
        for channel, spec in specs.items():
            destination[channel][to : to + count].copy_(source[channel][first : first + count, : spec.width])
        return
    device = next(iter(destination.values())).device
    read_index, write_index = to_device(read, device), to_device(write, device)
    for channel, spec in specs.items():
        rows = source[channel].index_select(0, read_index)[:, : spec.width]
        destination[channel].index_copy_(0, write_index, rows.to(spec.dtype))


def _is_run(numbers: Sequence[int]) -> bool:
    """Whether each number is one more than the one before."""
    return all(after == before + 1 for before, after in itertools.pairwise(numbers))
