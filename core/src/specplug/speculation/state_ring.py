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
    with many rows asleep that is the work of one step in eight. A GPU's lie where the next step writes its own, and are sorted
    at once.

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
        self._held_slots: set[int] = set()

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
        self._held.append(_HeldStep(captured, rows, slots, tokens))
        self._held_tokens += tokens
        self._held_slots.update(slots)
        if tokens > self._limit:
            self._sort()

    def oldest(self, slot: int) -> int | None:
        """The first position whose states are in the buffers, with all behind it; None if nothing was kept."""
        if slot in self._held_slots:
            self._sort()
        return self._oldest.get(slot)

    def drop(self, slot: int) -> None:
        """Forgets a slot."""
        if slot in self._held_slots:
            self._sort()
        self._oldest.pop(slot, None)

    def _sort(self) -> None:
        held, self._held, self._held_tokens = self._held, [], 0
        self._held_slots.clear()
        places: dict[int, int] = {}  # later steps overwrite earlier ones
        begin = 0
        for step in held:
            for slot in step.slots:
                positions, packed = step.rows.get(slot, (range(0), []))
                if not len(positions):
                    continue
                first = max(positions.start, positions.stop - WINDOW)
                for position in range(first, positions.stop):
                    places[self.place(slot, position)] = begin + packed[position - positions.start]
                kept = self._oldest.get(slot, positions.start)
                self._oldest[slot] = max(kept, positions.stop - WINDOW, 0)
            begin += step.tokens
        if not places:
            return
        captured = held[0].captured
        if len(held) > 1:
            captured = {channel: torch.cat([step.captured[channel] for step in held]) for channel in self._specs}
        copy_states(self._specs, captured, list(places.values()), self.buffers, list(places))


def _held_tokens(max_num_seqs: int, device: torch.device) -> int:
    """Tokens of the steps that are held at most."""
    return 8 * max(2, max_num_seqs) if device.type == "cpu" else 0


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
