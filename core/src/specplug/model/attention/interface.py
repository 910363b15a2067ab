"""Attention over the paged KV cache, plugged into Transformers' attention interface.

The interface calls one function with the attention module, queries, keys and values of the packed batch. Each attention
module of a runner carries an `AttentionSite`, through which the function finds the runner's KV cache and the current
batch: nothing is global, so that a process can have any number of runners.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from specplug.model.attention.eager import attend_row
from specplug.model.batch import ForwardBatch

IMPLEMENTATION = "specplug"
SITE = "specplug_attention_site"


class AttendedBatch(Protocol):
    """What native attention reads of a batch; only a `ForwardBatch` may be attended to otherwise."""

    @property
    def is_native(self) -> bool:
        """Whether attention is native."""

    @property
    def plan(self) -> torch.Tensor:
        """int32, see `attention.plan`."""

    @property
    def write_slots(self) -> torch.Tensor:
        """int64 [T], where the KV of each token goes."""


class AttentionSite:
    """One attention layer of a runner: its part of the KV cache, its window, and the current batch."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, window: int | None = None) -> None:
        self.keys = keys
        self.values = values
        self.window = window
        self.batch: AttendedBatch | None = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Stores the new keys and values, then attends with every query to its row.

        Args:
            query: [1, heads, T, key_dim].
            key: [1, kv_heads, T, key_dim].
            value: [1, kv_heads, T, value_dim].
            scaling: multiplies the scores.
            window: a query attends to keys fewer than this many positions back.
            softcap: scores become softcap · tanh(scores / softcap).
            sinks: [heads]: one extra score per head that takes probability and adds nothing to the output.

        Returns:
            [1, T, heads, value_dim].
        """
        batch = self.batch
        assert batch is not None, "the runner sets the batch before it calls the model"
        if batch.is_native:
            return torch.ops.specplug.attend(
                query,
                key,
                value,
                self.keys,
                self.values,
                batch.plan,
                batch.write_slots,
                scaling,
                window or 0,
                softcap or 0.0,
                sinks,
            )
        assert isinstance(batch, ForwardBatch)
        self.keys.index_copy_(1, batch.write_slots, key[0])
        self.values.index_copy_(1, batch.write_slots, value[0])
        heads = query.shape[1]
        out = query.new_empty(batch.num_tokens, heads, value.shape[-1])
        if batch.padded is not None:
            batch.padded.attend(query[0], self.keys, self.values, out, window, scaling, softcap, sinks)
        for view in batch.views(window, query.dtype):
            if view.slots is None:
                keys, values = self.keys[:, view.begin : view.end], self.values[:, view.begin : view.end]
            else:
                keys, values = self.keys.index_select(1, view.slots), self.values.index_select(1, view.slots)
            rows = query[0, :, view.first : view.last]
            attended = attend_row(rows, keys, values, view.mask, scaling, softcap, sinks, causal=view.causal)
            out[view.first : view.last] = attended.transpose(0, 1)
        return out[None]


def attention_interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with Transformers.

    Masks come from the site: its batch, and the window that was read from the model's own mask (see `load.masks`).
    """
    site = module.__dict__[SITE]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    return site.attend(query, key, value, scaling, site.window, softcap, s_aux), None


def register() -> None:
    """Makes the implementation known to Transformers. No mask function is registered, so no mask is ever built."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention_interface)
