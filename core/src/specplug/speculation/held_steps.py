"""Steps' target states put aside as they came, so that rows that sleep for long cost next to nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import attrs
import torch

from specplug.speculation.state_ring import WINDOW, Captured, Channel, ChannelSpec, StepCopy, StepRows, copy_steps

_SPARE = 2
_MOST_WAITING = 7


@attrs.frozen(eq=False)
class _Step:
    begin: int
    end: int
    rows: dict[int, tuple[range, int]]  # slot → (positions, where the first of them lies)


class HeldSteps:
    """The states of the last steps, for slots whose states somebody may ask for later. Of most of them nobody ever does.

    A step's are copied behind one another, over the oldest. On a CPU several steps wait for that in their own tensors, since
    what costs is to call an operation whose code has left the caches. (Were all held like this, the next steps would find ever
    other memory to compute in, which no cache knows.)

    Args:
        specs: the channels.
        max_num_seqs: slots.
        device: where states live.

    Attributes:
        buffers: [tokens, width] per channel.
        most: as many positions of a step may be put aside: then those of the last `WINDOW` steps are there.
    """

    def __init__(self, specs: Mapping[Channel, ChannelSpec], max_num_seqs: int, device: torch.device) -> None:
        self._specs = specs
        self._tokens = self.planned_positions(max_num_seqs)
        self.buffers = {
            channel: torch.zeros(self._tokens, spec.width, dtype=spec.dtype, device=device)
            for channel, spec in specs.items()
        }
        self.most = _SPARE * max_num_seqs
        self._end = 0
        self._steps: deque[_Step] = deque()
        self._forgotten = 0  # steps
        self._first: dict[int, int] = {}  # slot → the number of the first step that holds it
        self._waiting: list[tuple[Captured, StepRows, Sequence[int]]] = []
        # On a GPU the next step writes over what a captured one returned.
        self._most_waiting = _MOST_WAITING if device.type == "cpu" else 0

    @staticmethod
    def planned_positions(max_num_seqs: int) -> int:
        """Positions for which there is memory."""
        return _SPARE * WINDOW * max_num_seqs

    def add(self, captured: Captured, rows: StepRows, slots: Sequence[int], *, at_once: bool = False) -> None:
        """Puts the states of some of a step's slots aside, `most` positions at most.

        Args:
            captured: the step's states.
            rows: its rows.
            slots: those to put aside; what the step had not is left out.
            at_once: whether its tensors are too large to wait.
        """
        self._waiting.append((captured, rows, slots))
        if at_once or len(self._waiting) > self._most_waiting:
            self._take_in()

    def _take_in_of(self, slot: int) -> None:
        """Copies what waits, if a slot is among it: its name may stand for another row next."""
        if any(slot in slots for _, _, slots in self._waiting):
            self._take_in()

    def _take_in(self) -> None:
        """Copies what waits."""
        waiting, self._waiting = self._waiting, []
        copies: list[StepCopy] = []
        for captured, rows, slots in waiting:
            read, begin = self._place(rows, slots)
            if read:
                copies.append(([captured[channel] for channel in self._specs], read, range(begin, begin + len(read))))
        if copies:
            copy_steps(copies, list(self.buffers.values()))

    def _place(self, rows: StepRows, slots: Sequence[int]) -> tuple[list[int], int]:
        """Makes room for a step: what is read of its tensors, and where the first of it goes."""
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
        assert count <= self.most
        steps, begin = self._steps, self._end
        if begin + count > self._tokens:  # a lap ends; what lies behind here is of the one before
            while steps and steps[0].begin >= self._end:
                self._forget_oldest()
            begin = 0
        end = self._end = begin + count
        while steps and steps[0].begin < end and steps[0].end > begin:
            self._forget_oldest()
        number = self._forgotten + len(steps)
        for slot in lengths:
            self._first.setdefault(slot, number)
        steps.append(_Step(begin, end, lengths))
        return read, begin

    def take_out(self, slot: int) -> tuple[range, list[int], bool] | None:
        """A slot's last positions, `WINDOW` at most; None if none are held.

        Returns:
            The positions, where they lie in the buffers, and whether some between them and those before are gone.
        """
        self._take_in_of(slot)
        first = self._first.get(slot)
        if first is None:
            return None
        places: list[int] = []
        stop = 0
        for step, _ in zip(reversed(self._steps), range(self._forgotten + len(self._steps) - first), strict=False):
            positions, first_place = step.rows.get(slot, (range(0), 0))
            stop = stop or positions.stop
            places.extend(reversed(range(step.begin + first_place, step.begin + first_place + len(positions))))
            if len(places) >= WINDOW:
                break
        is_cut = first < self._forgotten
        self.drop(slot)
        del places[WINDOW:]
        places.reverse()
        return (range(stop - len(places), stop), places, is_cut) if places else None

    def drop(self, slot: int) -> None:
        """Lets go of a slot."""
        self._take_in_of(slot)
        self._first.pop(slot, None)
        if not self._first:
            self._forgotten += len(self._steps)
            self._steps.clear()

    def _forget_oldest(self) -> None:
        self._steps.popleft()
        self._forgotten += 1
