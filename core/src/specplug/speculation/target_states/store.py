"""The target states that speculators declared: captured in each step, stored for rows that skip it, delivered once.

A *channel* is one kind of state: a boundary of the residual stream, or the target's top-k ids or probabilities. A row that
is in every propose call gets its states directly from the step's tensors. For a row that is not, the last `WINDOW` positions
are stored: small steps as they are (`DeferredCopies`), prompts and states that are about to be delivered by position
(`StateRingBuffer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from specplug.contract.types import SpeculatorTraits
from specplug.speculation.target_states.deferred_copies import DeferredCopies
from specplug.speculation.target_states.ring_buffer import (
    WINDOW,
    Captured,
    Channel,
    ChannelSpec,
    StateRingBuffer,
    StepRows,
    copy_states,
)

TOP_IDS = "top_ids"
TOP_PROBS = "top_probs"
DraftedRows = Mapping[int, Sequence[int]]
"""Slot → indices of its draft's nodes in the packed batch."""


def channels_for(
    traits: Sequence[SpeculatorTraits], hidden_size: int, dtype: torch.dtype
) -> dict[Channel, ChannelSpec]:
    """The channels that any of the speculators declares."""
    specs: dict[Channel, ChannelSpec] = {}
    for trait in traits:
        for boundary in trait.hidden_states:
            specs[boundary] = ChannelSpec(hidden_size, dtype)
    if top_k := max((trait.top_k for trait in traits), default=0):
        specs[TOP_IDS] = ChannelSpec(top_k, torch.int64)
        specs[TOP_PROBS] = ChannelSpec(top_k, torch.float32)
    return specs


def _drafted_specs(specs: Mapping[Channel, ChannelSpec]) -> dict[Channel, ChannelSpec]:
    return {channel: specs[channel] for channel in (TOP_IDS, TOP_PROBS)}


def _position_bytes(specs: Mapping[Channel, ChannelSpec]) -> int:
    return sum(spec.width * spec.dtype.itemsize for spec in specs.values())


class TargetStateStore:
    """The states of all channels, in buffers at fixed addresses.

    Args:
        specs: the channels.
        max_num_seqs: rows.
        max_num_batched_tokens: the most tokens of a step.
        device: of the buffers.
        at_drafts: whether the top-k at draft nodes is delivered too.
    """

    def __init__(
        self,
        specs: Mapping[Channel, ChannelSpec],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        device: torch.device,
        *,
        at_drafts: bool = False,
    ) -> None:
        self.specs = dict(specs)
        capacity = max_num_batched_tokens + max_num_seqs * WINDOW
        self.delivery = {c: torch.zeros(capacity, s.width, dtype=s.dtype, device=device) for c, s in specs.items()}
        self._ring = StateRingBuffer(self.specs, max_num_seqs, device)
        self._deferred = DeferredCopies(self.specs, max_num_seqs, device)
        self._step: StepRows = {}
        self._current: Captured = {}
        self.at_drafts = at_drafts
        self._drafted_specs = _drafted_specs(self.specs) if at_drafts else {}
        self._drafted_delivery = {
            c: torch.zeros(max_num_batched_tokens, s.width, dtype=s.dtype, device=device)
            for c, s in self._drafted_specs.items()
        }
        self._drafted: DraftedRows = {}

    @staticmethod
    def planned_bytes(
        specs: Mapping[Channel, ChannelSpec], max_num_seqs: int, max_num_batched_tokens: int, *, at_drafts: bool = False
    ) -> int:
        """Bytes of the buffers."""
        positions = max_num_batched_tokens + 2 * max_num_seqs * WINDOW + DeferredCopies.planned_positions(max_num_seqs)
        drafted = max_num_batched_tokens * _position_bytes(_drafted_specs(specs)) if at_drafts else 0
        return positions * _position_bytes(specs) + drafted

    def record(self, captured: Captured, rows: StepRows, drafted: DraftedRows | None = None) -> None:
        """Receives a step's states.

        Args:
            captured: per channel [T, width] over the packed batch.
            rows: slot → (positions that became final, their indices in the packed batch).
            drafted: slot → indices of its draft's nodes in the packed batch, if the store is `at_drafts`.
        """
        self._current = captured
        self._step = rows
        self._drafted = drafted or {}

    def available_from(self, slot: int, start: int) -> int:
        """The first position, not before `start`, from which on all states of the row are stored."""
        self._move_to_ring([slot])
        step, _ = self._step.get(slot, (range(0), []))
        oldest = self._ring.oldest(slot)
        if oldest is None or (len(step) and start >= step.start):
            oldest = step.start if len(step) else start
        return max(start, oldest)

    def deliver(self, rows: Sequence[tuple[int, range]]) -> tuple[dict[Channel, torch.Tensor], list[slice]]:
        """Gathers the states of each (slot, positions) into the delivery buffers.

        The positions must not be before those that `available_from` returned.

        Returns:
            Per channel a view [N, width] of its buffer, and each row's slice of it.
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
                    from_ring.append(self._ring.index(slot, position))
                    to_ring.append(count)
                count += 1
            places.append(slice(count - len(positions), count))
        copy_states(self.specs, self._current, from_step, self.delivery, to_step)
        copy_states(self.specs, self._ring.buffers, from_ring, self.delivery, to_ring)
        return {channel: buffer[:count] for channel, buffer in self.delivery.items()}, places

    def deliver_drafted(self, slots: Sequence[int | None]) -> tuple[dict[Channel, torch.Tensor], list[slice]]:
        """Gathers the top-k at the nodes of the drafts that this step verified.

        Args:
            slots: the rows' slots; None for a row without delivery.

        Returns:
            Ids and probabilities, each a view [M, top_k] of its buffer, and each row's slice of it.
        """
        nodes: list[int] = []
        places: list[slice] = []
        for slot in slots:
            begin = len(nodes)
            if slot is not None:
                nodes.extend(self._drafted.get(slot, ()))
            places.append(slice(begin, len(nodes)))
        copy_states(self._drafted_specs, self._current, nodes, self._drafted_delivery, range(len(nodes)))
        return {channel: buffer[: len(nodes)] for channel, buffer in self._drafted_delivery.items()}, places

    def keep(self, slots: Sequence[int]) -> None:
        """Stores this step's states for rows that some speculator has not received yet."""
        rows, current = self._step, self._current
        if not slots or not current:
            return
        if len(next(iter(current.values()))) <= self._deferred.max_positions:
            self._deferred.add(current, rows, slots)
            return
        slots = [slot for slot in slots if slot in rows]
        if sum(len(rows[slot][0]) for slot in slots) > self._deferred.max_positions:
            long = [slot for slot in slots if len(rows[slot][0]) > 1]
            slots = [slot for slot in slots if len(rows[slot][0]) == 1]
            self._move_to_ring(long)
            self._ring.write(current, rows, long)
        self._deferred.add(current, rows, slots, at_once=True)

    def drop(self, slot: int) -> None:
        """Discards the stored states of a row: all speculators have received them, or the row ended."""
        self._deferred.drop(slot)
        self._ring.drop(slot)

    def end_step(self) -> None:
        """Ends the step. On a CPU its tensors may stay alive for some more steps; see `DeferredCopies`."""
        self._current = {}
        self._step = {}
        self._drafted = {}

    def _move_to_ring(self, slots: Sequence[int]) -> None:
        """Moves the deferred states of some rows to the ring buffer."""
        rows: dict[int, tuple[range, list[int]]] = {}
        for slot in slots:
            taken = self._deferred.take_out(slot)
            if taken is not None:
                positions, places, is_cut = taken
                rows[slot] = positions, places
                if is_cut:
                    self._ring.drop(slot)
        self._ring.write(self._deferred.buffers, rows, list(rows))
