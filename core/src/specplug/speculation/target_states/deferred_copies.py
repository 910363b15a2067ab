"""Target states stored step by step, so that rows without proposals cost almost nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import attrs
import torch

from specplug.speculation.target_states.ring_buffer import (
    WINDOW,
    Captured,
    Channel,
    ChannelSpec,
    StepCopy,
    StepRows,
    copy_steps,
)

_POSITIONS_PER_ROW = 2  # of a step
_MAX_PENDING = 7  # steps


@attrs.frozen(eq=False)
class _Step:
    begin: int
    end: int
    rows: dict[int, tuple[range, int]]  # slot → (positions, index of the first one)


class DeferredCopies:
    """The states of the last steps, for slots that may need them later. Most are never read.

    Each step's states are copied after those of the step before, in a circular buffer. On a CPU several steps are copied at
    once, since the main cost is calling an operation whose code has left the CPU caches. The number of such steps is small:
    keeping every step's tensors alive would make each step compute in memory that is not in the caches.

    Args:
        specs: the channels.
        max_num_seqs: slots.
        device: of the buffers.

    Attributes:
        buffers: [tokens, width] per channel.
        max_positions: the most positions of a step. With this limit the last `WINDOW` steps always fit.
    """

    def __init__(self, specs: Mapping[Channel, ChannelSpec], max_num_seqs: int, device: torch.device) -> None:
        self._specs = specs
        self._tokens = self.planned_positions(max_num_seqs)
        self.buffers = {
            channel: torch.zeros(self._tokens, spec.width, dtype=spec.dtype, device=device)
            for channel, spec in specs.items()
        }
        self.max_positions = _POSITIONS_PER_ROW * max_num_seqs
        self._end = 0
        self._steps: deque[_Step] = deque()
        self._num_discarded = 0  # steps
        self._first: dict[int, int] = {}  # slot → the number of the first step that has it
        self._pending: list[tuple[Captured, StepRows, Sequence[int]]] = []
        # On a GPU the next step overwrites the outputs of a captured one.
        self._max_pending = _MAX_PENDING if device.type == "cpu" else 0

    @staticmethod
    def planned_positions(max_num_seqs: int) -> int:
        """The number of positions in the buffers."""
        return _POSITIONS_PER_ROW * WINDOW * max_num_seqs

    def add(self, captured: Captured, rows: StepRows, slots: Sequence[int], *, at_once: bool = False) -> None:
        """Stores the states of some of a step's slots, at most `max_positions` positions.

        Args:
            captured: the step's states.
            rows: its rows.
            slots: the slots to store; those not in the step are skipped.
            at_once: whether to copy now, since the step's tensors are large.
        """
        self._pending.append((captured, rows, slots))
        if at_once or len(self._pending) > self._max_pending:
            self._copy_pending()

    def _copy_pending_of(self, slot: int) -> None:
        """Copies pending steps if a slot is in them, since the slot may belong to another row next."""
        if any(slot in slots for _, _, slots in self._pending):
            self._copy_pending()

    def _copy_pending(self) -> None:
        """Copies all pending steps."""
        pending, self._pending = self._pending, []
        copies: list[StepCopy] = []
        for captured, rows, slots in pending:
            read, begin = self._allocate(rows, slots)
            if read:
                copies.append(([captured[channel] for channel in self._specs], read, range(begin, begin + len(read))))
        if copies:
            copy_steps(copies, list(self.buffers.values()))

    def _allocate(self, rows: StepRows, slots: Sequence[int]) -> tuple[list[int], int]:
        """Makes room for a step: the rows to read from its tensors, and the index of the first row to write."""
        read: list[int] = []
        lengths: dict[int, tuple[range, int]] = {}
        for slot in slots:
            if slot in rows:
                positions, packed = rows[slot]
                lengths[slot] = positions, len(read)
                read += packed
        count = len(read)
        if not count:
            return read, self._end
        assert count <= self.max_positions
        steps, begin = self._steps, self._end
        if begin + count > self._tokens:  # wraps around; the rest of the buffer holds older steps
            while steps and steps[0].begin >= self._end:
                self._discard_oldest()
            begin = 0
        end = self._end = begin + count
        while steps and steps[0].begin < end and steps[0].end > begin:
            self._discard_oldest()
        number = self._num_discarded + len(steps)
        for slot in lengths:
            self._first.setdefault(slot, number)
        steps.append(_Step(begin, end, lengths))
        return read, begin

    def take_out(self, slot: int) -> tuple[range, list[int], bool] | None:
        """Removes a slot's last positions, at most `WINDOW`; None if there are none.

        Returns:
            The positions, their indices in the buffers, and whether positions before them were discarded.
        """
        self._copy_pending_of(slot)
        first = self._first.get(slot)
        if first is None:
            return None
        indices: list[int] = []
        stop = 0
        for step, _ in zip(reversed(self._steps), range(self._num_discarded + len(self._steps) - first), strict=False):
            positions, first_index = step.rows.get(slot, (range(0), 0))
            stop = stop or positions.stop
            indices.extend(reversed(range(step.begin + first_index, step.begin + first_index + len(positions))))
            if len(indices) >= WINDOW:
                break
        is_cut = first < self._num_discarded
        self.drop(slot)
        del indices[WINDOW:]
        indices.reverse()
        return (range(stop - len(indices), stop), indices, is_cut) if indices else None

    def drop(self, slot: int) -> None:
        """Discards a slot's states."""
        self._copy_pending_of(slot)
        self._first.pop(slot, None)
        if not self._first:
            self._num_discarded += len(self._steps)
            self._steps.clear()

    def _discard_oldest(self) -> None:
        self._steps.popleft()
        self._num_discarded += 1
