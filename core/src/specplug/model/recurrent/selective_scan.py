"""The selective scan of Mamba 1: every channel of a state decays by a number of its own, so that it has no matrix form.

S ← exp(Δ A) S + Δ x B, read by C (Gu and Dao 2023, "Mamba"). Tokens run one after the other, all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from specplug.model.recurrent.memory import Function
from specplug.model.recurrent.recurrence import Recurrence

if TYPE_CHECKING:
    from specplug.model.recurrent.batch import Window


class SelectiveScan(Recurrence):
    """`mamba_selective_scan`. Entries: Δ, Δ x and B of each token."""

    sequences = ("hidden_states", "dt", "B", "C", "z")
    axis = 2

    def __init__(self, sizes: tuple[int, ...], slots: int, held: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(sizes, slots, held, dtype, device)
        channels, size = sizes
        self._allocate(slots, (channels, size), held, ((channels,), (channels,), (size,)), device)

    @staticmethod
    def trace(given: dict[str, Any]) -> tuple[tuple[int, ...], Any]:
        """See `StateMemory.trace`: channels, numbers of a channel."""
        hidden_states = given["hidden_states"]
        return (hidden_states.shape[1], given["A"].shape[-1]), torch.empty_like(hidden_states)

    def _empty(self, given: dict[str, Any]) -> torch.Tensor:
        return torch.empty_like(given["hidden_states"])

    def _prompt(
        self, original: Function, given: dict[str, Any], state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = {name: given[name].transpose(1, 2) for name in self.sequences if given.get(name) is not None}
        steps = _step_sizes(tokens["dt"], given)
        inputs = steps * tokens["hidden_states"].float()
        rows = []
        for token in range(inputs.shape[1]):
            state = _move(state, given["A"], steps[:, token], inputs[:, token], tokens["B"][:, token].float())
            rows.append(_seen(state, tokens["C"][:, token]))
        return _finish(torch.stack(rows, dim=1), tokens, given).transpose(1, 2), state

    def _advance(
        self, states: torch.Tensor, entries: Sequence[torch.Tensor], valid: torch.Tensor, given: dict[str, Any]
    ) -> None:
        steps, inputs, writes = entries
        steps, inputs = steps * valid[..., None], inputs * valid[..., None]
        after = states
        for token in range(valid.shape[1]):
            after = _move(after, given["A"], steps[:, token], inputs[:, token], writes[:, token])
        states.copy_(after)

    def _read(
        self, window: Window, given: dict[str, Any], states: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        names = [name for name in self.sequences if given.get(name) is not None]
        tokens = {name: window.gather(given[name][0].T) for name in names}
        steps = _step_sizes(tokens["dt"], given).masked_fill(~window.valid[..., None], 0)
        inputs = window.mix(steps * tokens["hidden_states"].float(), self.entries[1])
        writes = window.mix(tokens["B"].float(), self.entries[2])
        steps = window.mix(steps, self.entries[0])
        after = [states]  # the states after each token, the one before the window first
        rows = []
        lines = torch.arange(len(states), dtype=torch.long, device=states.device)
        for token in range(window.width):
            before = after[token]
            if window.has_branches:
                before = torch.stack(after)[window.parents[:, token] + 1, lines]
            after.append(_move(before, given["A"], steps[:, token], inputs[:, token], writes[:, token]))
            rows.append(_seen(after[-1], tokens["C"][:, token]))
        return _finish(torch.stack(rows, dim=1), tokens, given), (steps, inputs, writes)


def _step_sizes(dt: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """Δ [..., channels], in float32."""
    if given.get("delta_bias") is not None:
        dt = dt + given["delta_bias"].to(dt.dtype)
    return (F.softplus(dt) if given.get("delta_softplus", False) else dt).float()


def _move(
    states: torch.Tensor, rates: torch.Tensor, steps: torch.Tensor, inputs: torch.Tensor, writes: torch.Tensor
) -> torch.Tensor:
    """States [R, channels, size] after one token each: its Δ and Δ x [R, channels] and B [R, size]."""
    return states * (steps[..., None] * rates.float()).exp() + inputs[..., None] * writes[:, None]


def _seen(states: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
    return (states @ reads.float()[..., None])[..., 0]


def _finish(out: torch.Tensor, tokens: dict[str, torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
    """Adds the inputs [R, T, channels] to what was read, and applies the gate."""
    if given.get("D") is not None:
        out = out + tokens["hidden_states"].float() * given["D"].float()
    return out * F.silu(tokens["z"].float()) if "z" in tokens else out
