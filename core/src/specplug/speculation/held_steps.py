"""Steps' target states held as they came, so that rows that sleep for long cost next to nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import attrs
import torch

from specplug.speculation.state_ring import WINDOW, Captured, Channel, StepRows, is_run

_STEPS = WINDOW + 16


@attrs.frozen(eq=False)
class _Step:
    captured: Captured
    rows: StepRows
    tokens: int


class HeldSteps:
    """The tensors of the last steps, for slots whose states somebody may ask for later. Most of them nobody ever does.

    A GPU's are overwritten by the next step; there nothing is held.

    Args:
        channels: what is wanted of a step.
        max_num_seqs: slots.
        device: where states live.
    """

    def __init__(self, channels: Collection[Channel], max_num_seqs: int, device: torch.device) -> None:
        self._channels = channels
        self._limit = self.most_tokens(max_num_seqs, device)
        self._tokens = 0
        self._steps: list[_Step] = []
        self._first: dict[int, int] = {}  # slot → the first step that holds it
        self._cut: set[int] = set()  # slots of which older states are gone

    @staticmethod
    def most_tokens(max_num_seqs: int, device: torch.device) -> int:
        """Tokens of the steps that are held at most."""
        return _STEPS * max_num_seqs if device.type == "cpu" else 0

    @property
    def slots(self) -> list[int]:
        """The slots of which something is held."""
        return list(self._first)

    def add(self, captured: Captured, rows: StepRows, slots: Sequence[int]) -> bool:
        """Holds a step; False if there is no room for it."""
        tokens = len(next(iter(captured.values()))) if captured else 0
        if self._tokens + tokens > self._limit and len(self._steps) > WINDOW:
            self._forget(len(self._steps) - WINDOW)
        if self._tokens + tokens > self._limit:
            return False
        for slot in slots:
            self._first.setdefault(slot, len(self._steps))
        self._steps.append(_Step(captured, rows, tokens))
        self._tokens += tokens
        return True

    def take_out(self, slot: int) -> tuple[Captured, range, bool] | None:
        """A slot's states, [N, width] per channel, of the last `WINDOW` positions at most; None if none are held.

        Returns:
            The states, their positions, and whether states between them and those before are gone.
        """
        first = self._first.get(slot)
        if first is None:
            return None
        found: list[tuple[_Step, list[int]]] = []
        count = stop = 0
        for step in reversed(self._steps[first:]):
            positions, packed = step.rows.get(slot, (range(0), []))
            if not len(positions):
                continue
            stop = stop or positions.stop
            found.append((step, packed[-(WINDOW - count) :]))
            count += len(found[-1][1])
            if count == WINDOW:
                break
        is_cut = slot in self._cut
        self.drop(slot)
        if not found:
            return None
        found.reverse()
        states = {
            channel: torch.cat([_select(step.captured[channel], places) for step, places in found])
            for channel in self._channels
        }
        return states, range(stop - count, stop), is_cut

    def drop(self, slot: int) -> None:
        """Lets go of a slot."""
        self._first.pop(slot, None)
        self._cut.discard(slot)
        if not self._first:
            self._steps, self._tokens = [], 0

    def _forget(self, count: int) -> None:
        """Lets go of the oldest steps."""
        self._tokens -= sum(step.tokens for step in self._steps[:count])
        del self._steps[:count]
        self._cut.update(slot for slot, first in self._first.items() if first < count)
        self._first = {slot: max(first - count, 0) for slot, first in self._first.items()}


def _select(states: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Some rows of a step's states."""
    return states[places[0] : places[-1] + 1] if is_run(places) else states[places]
