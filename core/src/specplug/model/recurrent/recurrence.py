"""What the layers with a recurrence share: bringing states forward, prompts, and the window of tokens that may be rejected."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from specplug.model.recurrent.memory import Function, StateMemory, TracedRows, bind, kernel_plan

if TYPE_CHECKING:
    from specplug.model.recurrent.batch import StateBatch, Window


class Recurrence(StateMemory):
    """A function with a matrix per head as its state, in float32.

    The tokens of a prompt go through the function itself, from the row's state. Those that may be rejected are computed for
    all rows at once, in closed form: what a token reads of the tokens before it is a matrix over pairs, masked to ancestors,
    and the state before the window is read once. What such a token adds to the state is kept, not the state after it: that
    would be as large as the state itself.

    Attributes:
        states: float32 [slots, ...].
    """

    initial: ClassVar[str] = ""
    """The function's argument for the state that it begins with."""
    final: ClassVar[str] = ""
    """The function's flag to return the state that it ends with."""

    states: torch.Tensor

    def _allocate(
        self,
        slots: int,
        state: tuple[int, ...],
        held: int,
        entries: Sequence[tuple[int, ...]],
        device: torch.device,
    ) -> None:
        memories = {"states": torch.zeros(slots, *state, dtype=torch.float32, device=device)}
        for number, each in enumerate(entries):
            memories[f"entries_{number}"] = torch.zeros(slots, held, *each, dtype=torch.float32, device=device)
        for name, tensor in memories.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def entries(self) -> list[torch.Tensor]:
        """float32 [slots, held, ...] each: what a token adds to the state."""
        return self.tensors[1:]

    def run(self, batch: StateBatch | TracedRows, original: Function, *args: Any, **kwargs: Any) -> Any:
        """See `StateMemory.run`."""
        given = bind(original, args, kwargs)
        if self.has_kernel and (plan := kernel_plan(batch)) is not None:
            return self._result(self._run_kernel(given, plan))
        assert not isinstance(batch, TracedRows)
        if batch.fresh is not None:
            self.states.index_fill_(0, batch.fresh, 0)
        if (replay := batch.replay) is not None:
            states = replay.slots.read(self.states)
            self._advance(states, [replay.gather(entries) for entries in self.entries], replay.valid, given)
            replay.slots.write(self.states, states)
        out = self._empty(given)
        for slot, begin, end in batch.prefixes:
            names = [name for name in self.sequences if given.get(name) is not None]
            part = {name: given[name].narrow(self.axis, begin, end - begin) for name in names}
            result, state = self._prompt(original, {**given, **part}, self.states[slot : slot + 1])
            out.narrow(self.axis, begin, end - begin).copy_(result)
            self.states[slot].copy_(state[0])
        if (window := batch.window) is not None:
            result, entries = self._read(window, given, window.slots.read(self.states))
            for stored, new in zip(self.entries, entries, strict=True):
                window.slots.write_first(stored, new)
            window.scatter(result, out.movedim(self.axis, 1)[0])
        return self._result(out)

    def _run_kernel(self, given: dict[str, Any], plan: torch.Tensor) -> torch.Tensor:
        """The result for the packed batch, by our kernel."""
        raise NotImplementedError

    def _prompt(
        self, original: Function, given: dict[str, Any], state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The result of one row's tokens and the state after them [1, ...]."""
        result, after = original(**{**given, self.initial: state, self.final: True})
        return result, after

    @abstractmethod
    def _empty(self, given: dict[str, Any]) -> torch.Tensor:
        """An empty result for the packed batch."""

    @abstractmethod
    def _advance(
        self, states: torch.Tensor, entries: Sequence[torch.Tensor], valid: torch.Tensor, given: dict[str, Any]
    ) -> None:
        """Brings states [R, ...] forward over entries [R, M, ...], in place; only those that are valid [R, M] count."""

    @abstractmethod
    def _read(
        self, window: Window, given: dict[str, Any], states: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """The results [R, W, ...] of a window from the states before it, and its entries [R, W, ...]."""

    def _result(self, out: torch.Tensor) -> Any:
        """What the function returns."""
        return out


def decays(rates: torch.Tensor, ancestors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of a state, and of what each token added to it, is left at each token of a window.

    Args:
        rates: [R, H, W]: logarithms of what a token leaves.
        ancestors: bool [R, W, W].

    Returns:
        [R, H, W], since before the window; [R, H, W, W], from the second token on to the first, 0 where it is no ancestor.
    """
    total = rates @ ancestors.to(rates.dtype).transpose(1, 2)
    between = total[..., :, None] - total[..., None, :]
    return total.exp(), between.masked_fill(~ancestors[:, None], -torch.inf).exp()
