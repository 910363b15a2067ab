"""Steps' target states put aside as they came, so that rows that sleep for long cost next to nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import attrs
import torch

from specplug.speculation.state_ring import WINDOW, Captured, Channel, ChannelSpec, StepRows

_SPARE = 2
_MOST_VIEWS = 256


@attrs.frozen(eq=False)
class _Step:
    begin: int
    end: int
    rows: StepRows


class HeldSteps:
    """The states of the last steps, for slots whose states somebody may ask for later. Of most of them nobody ever does.

    A step is copied whole, by one operation, over the oldest. (To hold the step's own tensors would be for nothing at first
    sight; but then the next steps find other memory to compute in, which no cache knows.)

    Args:
        specs: the channels.
        max_num_seqs: slots; steps of up to twice as many tokens are taken.
        device: where states live.

    Attributes:
        buffers: [tokens, width] per channel.
    """

    def __init__(self, specs: Mapping[Channel, ChannelSpec], max_num_seqs: int, device: torch.device) -> None:
        self._tokens = self.planned_positions(max_num_seqs)
        self.buffers = {
            channel: torch.zeros(self._tokens, spec.width, dtype=spec.dtype, device=device)
            for channel, spec in specs.items()
        }
        self._limit = _SPARE * max_num_seqs
        self._end = 0
        self._steps: deque[_Step] = deque()
        self._forgotten = 0  # steps
        self._first: dict[int, int] = {}  # slot → the number of the first step that holds it
        self._views: dict[tuple[int, int], list[torch.Tensor]] = {}

    @staticmethod
    def planned_positions(max_num_seqs: int) -> int:
        """Positions for which there is memory."""
        return _SPARE * WINDOW * max_num_seqs

    @property
    def slots(self) -> list[int]:
        """The slots of which something is held."""
        return list(self._first)

    def add(self, captured: Captured, rows: StepRows, slots: Iterable[int]) -> bool:
        """Puts a step aside; False if it is too large."""
        states = [captured[channel] for channel in self.buffers]
        tokens = len(states[0])
        if tokens > self._limit:
            return False
        begin = self._end if self._end + tokens <= self._tokens else 0
        end = self._end = begin + tokens
        steps = self._steps
        while steps and steps[0].begin < end and steps[0].end > begin:
            steps.popleft()
            self._forgotten += 1
        torch._foreach_copy_(self._view(begin, end), states)
        number = self._forgotten + len(steps)
        for slot in slots:
            self._first.setdefault(slot, number)
        steps.append(_Step(begin, end, rows))
        return True

    def take_out(self, slot: int) -> tuple[range, list[int], bool] | None:
        """A slot's last positions, `WINDOW` at most; None if none are held.

        Returns:
            The positions, where they lie in the buffers, and whether some between them and those before are gone.
        """
        first = self._first.get(slot)
        if first is None:
            return None
        places: list[int] = []
        stop = 0
        for step, _ in zip(reversed(self._steps), range(self._forgotten + len(self._steps) - first), strict=False):
            positions, packed = step.rows.get(slot, (range(0), []))
            stop = stop or positions.stop
            places.extend(step.begin + place for place in reversed(packed))
            if len(places) >= WINDOW:
                break
        is_cut = first < self._forgotten
        self.drop(slot)
        del places[WINDOW:]
        places.reverse()
        return (range(stop - len(places), stop), places, is_cut) if places else None

    def drop(self, slot: int) -> None:
        """Lets go of a slot."""
        self._first.pop(slot, None)
        if not self._first:
            self._forgotten += len(self._steps)
            self._steps.clear()

    def _view(self, begin: int, end: int) -> list[torch.Tensor]:
        """A part of all buffers; the same few are wanted again and again."""
        views = self._views.get((begin, end))
        if views is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            views = self._views[begin, end] = [buffer[begin:end] for buffer in self.buffers.values()]
        return views
