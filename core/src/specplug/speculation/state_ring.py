"""The last target states of rows that sleep, kept until their speculators wake."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import attrs
import torch

from specplug.contract.traits import Boundary
from specplug.model.device import to_device

WINDOW = 64
HELD_TOKENS = 16
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

    What small steps computed is held as it came, up to `HELD_TOKENS` tokens, and copied when it is needed or the limit is
    reached: one copy for many steps. A GPU's states lie where the next step writes its own, and are copied at once.

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
        self._holds = device.type == "cpu"
        self._oldest: dict[int, int] = {}  # slot → first position kept
        self._held: list[_HeldStep] = []
        self._held_slots: set[int] = set()

    @staticmethod
    def planned_positions(max_num_seqs: int) -> int:
        """Positions whose states can exist at once: in the ring, held, and held ones put together for their copy."""
        return max_num_seqs * WINDOW + 2 * HELD_TOKENS

    @staticmethod
    def place(slot: int, position: int) -> int:
        """Where a position lies in the buffers."""
        return slot * WINDOW + position % WINDOW

    def keep(self, captured: Captured, rows: StepRows, slots: Sequence[int]) -> None:
        """Keeps a step's states of some slots; its tensors may be held."""
        if not slots or not captured:
            return
        tokens = len(next(iter(captured.values())))
        if sum(step.tokens for step in self._held) + tokens > HELD_TOKENS:
            self._copy_held()
        self._held.append(_HeldStep(captured, rows, slots, tokens))
        self._held_slots.update(slots)
        if not self._holds or tokens > HELD_TOKENS:
            self._copy_held()

    def oldest(self, slot: int) -> int | None:
        """The first position whose states are in the buffers, with all behind it; None if nothing was kept."""
        if slot in self._held_slots:
            self._copy_held()
        return self._oldest.get(slot)

    def drop(self, slot: int) -> None:
        """Forgets a slot."""
        if slot in self._held_slots:
            self._copy_held()
        self._oldest.pop(slot, None)

    def _copy_held(self) -> None:
        held, self._held = self._held, []
        self._held_slots = set()
        sources: dict[int, int] = {}
        offset = 0
        for step in held:
            for slot in step.slots:
                positions, packed = step.rows.get(slot, (range(0), []))
                if not len(positions):
                    continue
                first = max(positions.start, positions.stop - WINDOW)
                for position in range(first, positions.stop):
                    sources[self.place(slot, position)] = offset + packed[position - positions.start]
                kept = self._oldest.get(slot, positions.start)
                self._oldest[slot] = max(kept, positions.stop - WINDOW, 0)
            offset += step.tokens
        if not sources:
            return
        captured = held[0].captured
        if len(held) > 1:
            captured = {channel: torch.cat([step.captured[channel] for step in held]) for channel in self._specs}
        copy_states(self._specs, captured, list(sources.values()), self.buffers, list(sources))


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
