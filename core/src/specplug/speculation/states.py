"""The target states that speculators asked for: captured per step, kept for rows that sleep, handed over once.

A *channel* is one kind of state: a boundary of the residual stream, or the target's top-k ids and probabilities. What a
step computed lies in that step's tensors; rows that are not shown it at once keep their last `WINDOW` positions in a ring.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import attrs
import torch

from specplug.contract.traits import Boundary, SpeculatorTraits
from specplug.model.device import to_device

WINDOW = 64
TOP_IDS = "top_ids"
TOP_PROBS = "top_probs"
Channel = Boundary | str


@attrs.frozen
class ChannelSpec:
    """Width and dtype of one channel."""

    width: int
    dtype: torch.dtype


def channels_for(
    traits: Sequence[SpeculatorTraits], hidden_size: int, dtype: torch.dtype
) -> dict[Channel, ChannelSpec]:
    """The channels that any of the speculators asked for."""
    specs: dict[Channel, ChannelSpec] = {}
    for trait in traits:
        for boundary in trait.hidden_states:
            specs[boundary] = ChannelSpec(hidden_size, dtype)
    if top_k := max((trait.top_k for trait in traits), default=0):
        specs[TOP_IDS] = ChannelSpec(top_k, torch.int64)
        specs[TOP_PROBS] = ChannelSpec(top_k, torch.float32)
    return specs


class StateStore:
    """Buffers of all channels, at fixed addresses.

    Args:
        specs: the channels.
        max_num_seqs: rows.
        max_num_batched_tokens: tokens one step can finish.
        device: where states live.
    """

    def __init__(
        self, specs: Mapping[Channel, ChannelSpec], max_num_seqs: int, max_num_batched_tokens: int, device: torch.device
    ) -> None:
        self.specs = dict(specs)
        self._device = device
        capacity = max_num_batched_tokens + max_num_seqs * WINDOW
        self.delivery = {c: torch.zeros(capacity, s.width, dtype=s.dtype, device=device) for c, s in specs.items()}
        self._ring = {
            c: torch.zeros(max_num_seqs * WINDOW, s.width, dtype=s.dtype, device=device) for c, s in specs.items()
        }
        self._oldest: dict[int, int] = {}  # slot → first position kept in the ring
        self._step: dict[int, tuple[range, list[int]]] = {}
        self._current: Mapping[Channel, torch.Tensor] = {}

    @staticmethod
    def planned_bytes(specs: Mapping[Channel, ChannelSpec], max_num_seqs: int, max_num_batched_tokens: int) -> int:
        """Bytes of the buffers."""
        per_position = sum(spec.width * spec.dtype.itemsize for spec in specs.values())
        return per_position * (max_num_batched_tokens + 2 * max_num_seqs * WINDOW)

    def record(self, captured: Mapping[Channel, torch.Tensor], rows: Mapping[int, tuple[range, list[int]]]) -> None:
        """Takes over a step's states.

        Args:
            captured: per channel [T, width] over the packed batch.
            rows: slot → (positions that became final, where they lie in the packed batch).
        """
        self._current = captured
        self._step = dict(rows)

    def available_from(self, slot: int, start: int) -> int:
        """The first position at or after `start` from which on all of the row's states are there."""
        step, _ = self._step.get(slot, (range(0), []))
        oldest = self._oldest.get(slot)
        if oldest is None or (len(step) and start >= step.start):
            oldest = step.start if len(step) else start
        return max(start, oldest)

    def deliver(self, rows: Sequence[tuple[int, range]]) -> tuple[dict[Channel, torch.Tensor], list[slice]]:
        """Gathers the states of each (slot, positions) into the delivery buffers.

        Returns:
            Per channel a view [N, width] of its buffer, and each row's place in it.
        """
        from_step: list[int] = []
        to_step: list[int] = []
        from_ring: list[int] = []
        to_ring: list[int] = []
        places: list[slice] = []
        count = 0
        for slot, positions in rows:
            step, packed = self._step.get(slot, (range(0), []))
            for position in positions:
                if len(step) and position >= step.start:
                    from_step.append(packed[position - step.start])
                    to_step.append(count)
                else:
                    from_ring.append(slot * WINDOW + position % WINDOW)
                    to_ring.append(count)
                count += 1
            places.append(slice(count - len(positions), count))
        if self.specs:
            self._copy(self._current, from_step, self.delivery, to_step)
            self._copy(self._ring, from_ring, self.delivery, to_ring)
        return {channel: buffer[:count] for channel, buffer in self.delivery.items()}, places

    def keep(self, slots: Sequence[int]) -> None:
        """Keeps this step's states of rows that somebody has not seen yet."""
        sources: list[int] = []
        targets: list[int] = []
        for slot in slots:
            step, packed = self._step.get(slot, (range(0), []))
            if not len(step):
                continue
            first = max(step.start, step.stop - WINDOW)
            for position in range(first, step.stop):
                sources.append(packed[position - step.start])
                targets.append(slot * WINDOW + position % WINDOW)
            kept = self._oldest.get(slot, step.start)
            self._oldest[slot] = max(kept, step.stop - WINDOW, 0)
        if self.specs:
            self._copy(self._current, sources, self._ring, targets)

    def drop(self, slot: int) -> None:
        """Forgets what was kept for a row: everybody has seen it, or it ended."""
        self._oldest.pop(slot, None)

    def end_step(self) -> None:
        """Lets go of the step's tensors."""
        self._current = {}
        self._step = {}

    def _copy(
        self,
        source: Mapping[Channel, torch.Tensor],
        read: list[int],
        destination: Mapping[Channel, torch.Tensor],
        write: list[int],
    ) -> None:
        if not read:
            return
        if _is_run(read) and _is_run(
            write
        ):  # a slice takes a third of the time of an index, and one row is the usual case
            first, to, count = read[0], write[0], len(read)
            for channel, spec in self.specs.items():
                destination[channel][to : to + count].copy_(source[channel][first : first + count, : spec.width])
            return
        read_index, write_index = to_device(read, self._device), to_device(write, self._device)
        for channel, spec in self.specs.items():
            rows = source[channel].index_select(0, read_index)[:, : spec.width]
            destination[channel].index_copy_(0, write_index, rows.to(spec.dtype))


def _is_run(numbers: Sequence[int]) -> bool:
    """Whether each number is one more than the one before."""
    return all(after == before + 1 for before, after in itertools.pairwise(numbers))
