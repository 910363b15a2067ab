"""The gated delta rule: a token corrects what the state says for its key, after the state has decayed.

S ← (I − β k kᵀ) exp(g) S + β k vᵀ, read by q. With u = β (v − (exp(g) S)ᵀ k), it adds k uᵀ. The u of a window follow from a
triangular system over pairs of tokens (Yang et al. 2024, "Gated Delta Networks"); it has the same form over a tree.
In gated delta nets g is one number per head, in Kimi's delta attention one per head and key channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from specplug.model.recurrent.recurrence import Recurrence, decays

if TYPE_CHECKING:
    from specplug.model.recurrent.batch import Window

_EPSILON = 1e-6


class DeltaRule(Recurrence):
    """`torch_chunk_gated_delta_rule` and `chunk_kimi_delta_attention`. Entries: k, u and g of each token."""

    sequences = ("query", "key", "value", "g", "beta")
    axis = 1
    initial = "initial_state"
    final = "output_final_state"
    has_kernel = True

    def __init__(self, sizes: tuple[int, ...], slots: int, held: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(sizes, slots, held, dtype, device)
        key_heads, heads, key_dim, value_dim, rates = sizes
        self._groups = heads // key_heads
        entries = ((key_heads, key_dim), (heads, value_dim), (heads, rates))
        self._allocate(slots, (heads, key_dim, value_dim), held, entries, device)

    @staticmethod
    def trace(given: dict[str, Any]) -> tuple[tuple[int, ...], Any]:
        """See `StateMemory.trace`: heads of keys, heads, sizes of a key and a value, decay rates of a head."""
        key, value, g = given["key"], given["value"], given["g"]
        rates = 1 if g.dim() == 3 else g.shape[-1]
        return (key.shape[2], value.shape[2], key.shape[3], value.shape[3], rates), (torch.empty_like(value), None)

    def _empty(self, given: dict[str, Any]) -> torch.Tensor:
        return torch.empty_like(given["value"], dtype=given["query"].dtype)

    def _result(self, out: torch.Tensor) -> Any:
        return out, None

    def _run_kernel(self, given: dict[str, Any], plan: torch.Tensor) -> torch.Tensor:
        query, key, value, g, beta = (given[name][0] for name in self.sequences)
        rates = g if g.dim() == 3 else g[..., None]
        is_normalised = bool(given.get("use_qk_l2norm_in_kernel", False))
        memories = (self.states, *self.entries)
        return torch.ops.specplug.delta_rule(query, key, value, rates, beta, *memories, plan, is_normalised)[None]

    def _repeat(self, keys: torch.Tensor) -> torch.Tensor:
        """[..., key heads, dim] → [..., heads, dim]."""
        return keys if self._groups == 1 else keys.repeat_interleave(self._groups, dim=-2)

    def _advance(
        self, states: torch.Tensor, entries: Sequence[torch.Tensor], valid: torch.Tensor, given: dict[str, Any]
    ) -> None:
        keys, corrections, rates = entries
        total = (rates * valid[..., None, None]).cumsum(1)
        last = total[:, -1:]
        weighted = self._repeat(keys) * (last - total).exp() * valid[..., None, None]
        states.mul_(last[:, 0].exp().unsqueeze(-1))
        left, right = weighted.permute(0, 2, 3, 1).flatten(0, 1), corrections.transpose(1, 2).flatten(0, 1)
        states.flatten(0, 1).baddbmm_(left, right)

    def _read(
        self, window: Window, given: dict[str, Any], states: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        query, key, value, g, beta = (window.gather(given[name][0]).float() for name in self.sequences)
        if given.get("use_qk_l2norm_in_kernel", False):
            query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPSILON) for x in (query, key))
        rates = (g if g.dim() == 4 else g[..., None]).masked_fill(~window.valid[..., None, None], 0)
        key, rates = window.mix(key, self.entries[0]), window.mix(rates, self.entries[2])
        strengths = beta.masked_fill(~window.valid[..., None], 0).transpose(1, 2)[..., None]
        q, k = (self._repeat(x).transpose(1, 2) for x in (query * query.shape[-1] ** -0.5, key))
        v = value.transpose(1, 2)
        left, reads, overlaps = self._pairs(window, q, k, rates.transpose(1, 2))
        seen = torch.cat([k * left, q * left], dim=2) @ states
        wanted = strengths * (v - seen[:, :, : window.width])
        if window.stored is not None:
            stored = window.is_stored[:, None, :, None]
            old = window.mix(wanted.transpose(1, 2), self.entries[1]).transpose(1, 2)
            wanted, strengths = torch.where(stored, old, wanted), strengths.masked_fill(stored, 0)
        if window.width > 1:
            wanted = torch.linalg.solve_triangular(strengths * overlaps, wanted, upper=False, unitriangular=True)
        out = seen[:, :, window.width :] + reads @ wanted
        return out.transpose(1, 2), (key, wanted.transpose(1, 2), rates)

    @staticmethod
    def _pairs(
        window: Window, q: torch.Tensor, k: torch.Tensor, rates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is left of the state at each token [R, H, W, 1 or key dim]; products of queries and of keys with keys."""
        if rates.shape[-1] == 1:
            left, between = decays(rates[..., 0], window.ancestors)
            return left[..., None], (q @ k.transpose(2, 3)) * between, (k @ k.transpose(2, 3)) * between
        total = window.ancestors.to(rates.dtype)[:, None] @ rates
        between = (total[..., :, None, :] - total[..., None, :, :]).masked_fill(
            ~window.ancestors[:, None, :, :, None], -torch.inf
        )
        decayed = k[..., None, :, :] * between.exp()
        return total.exp(), (q[..., :, None, :] * decayed).sum(-1), (k[..., :, None, :] * decayed).sum(-1)
