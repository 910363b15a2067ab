"""The state-space scan of Mamba 2: a state decays by one number per head and adds what a token writes.

S ← exp(a) S + x Bᵀ, read by C (Dao and Gu 2024, "Transformers are SSMs"); x is the token's input times its step size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from specplug.model.recurrent.recurrence import Recurrence, decays

if TYPE_CHECKING:
    from specplug.model.recurrent.batch import Window


class StateSpaceScan(Recurrence):
    """`mamba2_chunk_scan`. Entries: B, x and a of each token."""

    sequences = ("hidden_states", "dt", "B", "C")
    axis = 1
    initial = "initial_states"
    final = "return_final_states"
    has_kernel = True

    def __init__(self, sizes: tuple[int, ...], slots: int, held: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(sizes, slots, held, dtype, device)
        heads, width, groups, size = sizes
        self._per_group = heads // groups
        self._allocate(slots, (heads, width, size), held, ((groups, size), (heads, width), (heads,)), device)

    @staticmethod
    def trace(given: dict[str, Any]) -> tuple[tuple[int, ...], Any]:
        """See `StateMemory.trace`: heads, their width, groups of B and C, their size."""
        hidden_states = given["hidden_states"]
        return (*hidden_states.shape[2:], *given["B"].shape[2:]), torch.empty_like(hidden_states)

    def _empty(self, given: dict[str, Any]) -> torch.Tensor:
        return torch.empty_like(given["hidden_states"], dtype=torch.float32)

    def _run_kernel(self, given: dict[str, Any], plan: torch.Tensor) -> torch.Tensor:
        hidden, dt, writes, reads = (given[name][0] for name in self.sequences)
        steps = _step_sizes(dt, given)
        rates = given["A"].float() * steps
        memories = (self.states, *self.entries)
        return torch.ops.specplug.state_space_scan(
            hidden, steps, rates, writes, reads, given.get("D"), *memories, plan
        )[None]

    def _repeat(self, groups: torch.Tensor) -> torch.Tensor:
        """[R, groups, ...] → [R, heads, ...]."""
        return groups if self._per_group == 1 else groups.repeat_interleave(self._per_group, dim=1)

    def _advance(
        self, states: torch.Tensor, entries: Sequence[torch.Tensor], valid: torch.Tensor, given: dict[str, Any]
    ) -> None:
        writes, inputs, rates = entries
        total = (rates * valid[..., None]).cumsum(1)
        last = total[:, -1:]
        weighted = inputs * ((last - total).exp() * valid[..., None])[..., None]
        states.mul_(last[:, 0].exp()[..., None, None])
        left, right = weighted.permute(0, 2, 3, 1).flatten(0, 1), self._repeat(writes.transpose(1, 2)).flatten(0, 1)
        states.flatten(0, 1).baddbmm_(left, right)

    def _read(
        self, window: Window, given: dict[str, Any], states: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        hidden, dt, writes, reads = (window.gather(given[name][0]) for name in self.sequences)
        steps = _step_sizes(dt, given).masked_fill(~window.valid[..., None], 0)
        hidden = hidden.float()
        writes = window.mix(writes.float(), self.entries[0])
        inputs = window.mix(hidden * steps[..., None], self.entries[1])
        rates = window.mix(given["A"].float() * steps, self.entries[2])
        left, between = decays(rates.transpose(1, 2), window.ancestors)
        c = reads.float().transpose(1, 2)
        pairs = self._repeat(c @ writes.permute(0, 2, 3, 1)) * between
        seen = (self._repeat(c) @ states.transpose(2, 3)) * left[..., None]
        out = (seen + pairs @ inputs.transpose(1, 2)).transpose(1, 2)
        if given.get("D") is not None:
            out = out + given["D"].float()[:, None] * hidden
        return out, (writes, inputs, rates)


def _step_sizes(dt: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """The size of a token's step [..., heads], in float32."""
    if given.get("dt_bias") is not None:
        dt = dt + given["dt_bias"].to(dt.dtype)
    if given.get("dt_softplus", False):
        dt = F.softplus(dt)
    return dt.clamp(*given.get("dt_limit", (0.0, float("inf")))).float()
