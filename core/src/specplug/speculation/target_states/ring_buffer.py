"""The last target states of each row, in a ring buffer at fixed addresses; and copying of states."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import attrs
import torch

from specplug.contract.types import Boundary
from specplug.model.device import to_device
from specplug.native import library

WINDOW = 64
Channel = Boundary | str
Captured = Mapping[Channel, torch.Tensor]
StepRows = Mapping[int, tuple[range, list[int]]]
"""Slot → (positions that became final, their indices in the packed batch)."""
StepCopy = tuple[Sequence[torch.Tensor], Sequence[int], Sequence[int]]
"""A step's states in the order of the channels, the rows to read, and the rows to write."""


@attrs.frozen
class ChannelSpec:
    """Width and dtype of one channel."""

    width: int
    dtype: torch.dtype


class StateRingBuffer:
    """For every slot the states of its last `WINDOW` positions.

    Args:
        specs: the channels.
        max_num_seqs: slots.
        device: of the buffers.
    """

    def __init__(self, specs: Mapping[Channel, ChannelSpec], max_num_seqs: int, device: torch.device) -> None:
        self.buffers = {
            channel: torch.zeros(max_num_seqs * WINDOW, spec.width, dtype=spec.dtype, device=device)
            for channel, spec in specs.items()
        }
        self._specs = specs
        self._oldest: dict[int, int] = {}  # slot → first stored position

    @staticmethod
    def index(slot: int, position: int) -> int:
        """The index of a position in the buffers."""
        return slot * WINDOW + position % WINDOW

    def write(self, captured: Captured, rows: StepRows, slots: Sequence[int]) -> None:
        """Copies a step's states of some slots."""
        sources: list[int] = []
        targets: list[int] = []
        for slot in slots:
            positions, packed = rows.get(slot, (range(0), []))
            if not len(positions):
                continue
            first = max(positions.start, positions.stop - WINDOW)
            for position in range(first, positions.stop):
                sources.append(packed[position - positions.start])
                targets.append(self.index(slot, position))
            kept = self._oldest.get(slot, positions.start)
            self._oldest[slot] = max(kept, positions.stop - WINDOW, 0)
        copy_states(self._specs, captured, sources, self.buffers, targets)

    def oldest(self, slot: int) -> int | None:
        """The first position from which on all are stored; None if there is none."""
        return self._oldest.get(slot)

    def drop(self, slot: int) -> None:
        """Discards a slot's states."""
        self._oldest.pop(slot, None)


def copy_states(
    specs: Mapping[Channel, ChannelSpec],
    source: Captured,
    read: Sequence[int],
    destination: Captured,
    write: Sequence[int],
) -> None:
    """Copies rows `read` of the source to rows `write` of the destination, in all channels."""
    if read:
        copy_steps([([source[channel] for channel in specs], read, write)], [destination[channel] for channel in specs])


def copy_steps(steps: Sequence[StepCopy], destinations: Sequence[torch.Tensor]) -> None:
    """The same for several steps at once; each must have at least one row to copy."""
    device = destinations[0].device
    if device.type == "cpu" and library.available():
        sources, reads, writes = zip(*steps, strict=True)
        torch.ops.specplug.copy_rows.default(
            [tensor for own in sources for tensor in own],
            [len(read) for read in reads],
            [place for read in reads for place in read],
            destinations,
            [place for write in writes for place in write],
        )
        return
    for step in steps:
        _copy(*step, destinations)


def _copy(
    sources: Sequence[torch.Tensor], read: Sequence[int], write: Sequence[int], destinations: Sequence[torch.Tensor]
) -> None:
    device = destinations[0].device
    if _is_run(read) and _is_run(write):
        count = len(read)
        torch._foreach_copy_(
            [to[write[0] : write[0] + count] for to in destinations],
            [
                tensor[read[0] : read[0] + count, : to.shape[1]]
                for tensor, to in zip(sources, destinations, strict=True)
            ],
        )
        return
    read_index = to_device(read, device)
    if _is_run(write):  # one launch instead of two
        for tensor, to in zip(sources, destinations, strict=True):
            place = to[write[0] : write[0] + len(write)]
            if tensor.shape[1] == to.shape[1] and tensor.dtype == to.dtype:
                torch.index_select(tensor, 0, read_index, out=place)
            else:
                place.copy_(tensor.index_select(0, read_index)[:, : to.shape[1]])
        return
    write_index = to_device(write, device)
    for tensor, to in zip(sources, destinations, strict=True):
        to.index_copy_(0, write_index, tensor.index_select(0, read_index)[:, : to.shape[1]].to(to.dtype))


def _is_run(numbers: Sequence[int]) -> bool:
    """Whether each number is one more than the one before."""
    return all(after == before + 1 for before, after in itertools.pairwise(numbers))
