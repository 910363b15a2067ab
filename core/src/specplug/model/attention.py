"""Attention over the paged KV cache, plugged into Transformers' attention interface.

The interface calls one function with the attention module, queries, keys and values of the packed batch. Each attention
module of a runner carries an `AttentionSite`, through which the function finds the runner's KV cache and the current
batch: nothing is global, and any number of runners can live side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from specplug.model.forward import ForwardBatch
    from specplug.model.trace import TracedBatch

IMPLEMENTATION = "specplug"
SITE = "specplug_attention_site"
_FOLD_LIMIT = 32
_SCORE_LIMIT = 1 << 26


class AttentionSite:
    """One attention layer of a runner: its part of the KV cache, its window, and the batch under way."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, window: int | None = None) -> None:
        self.keys = keys
        self.values = values
        self.window = window
        self.batch: ForwardBatch | TracedBatch | None = None

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
        """Stores the new keys and values, then lets every query see its row.

        Args:
            query: [1, heads, T, key_dim].
            key: [1, kv_heads, T, key_dim].
            value: [1, kv_heads, T, value_dim].
            scaling: multiplies the scores.
            window: a query sees keys fewer than this many positions back.
            softcap: scores become softcap · tanh(scores / softcap).
            sinks: [heads]: one extra score per head that takes probability and gives nothing.

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
        batch = cast("ForwardBatch", batch)  # a traced one is native
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


def attend_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of one row.

    Args:
        query: [heads, q, key_dim].
        keys: [kv_heads, L, key_dim].
        values: [kv_heads, L, value_dim].
        mask: additive [q, L], or None.
        scaling: multiplies the scores.
        softcap: see `AttentionSite.attend`.
        sinks: see `AttentionSite.attend`.
        causal: the mask is SDPA's own causal one (then q == L); faster than the same mask spelled out.

    Returns:
        [heads, q, value_dim].
    """
    heads, count, _ = query.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    if softcap is not None or sinks is not None:
        return _attend_explicit(query, keys, values, mask, scaling, softcap, sinks)
    if group > 1 and count > _FOLD_LIMIT:
        attended = F.scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=None if causal else mask,
            is_causal=causal,
            scale=scaling,
            enable_gqa=True,
        )
        return attended[0]
    # The query heads of a group share their keys: fold them into the query dimension, so that keys are read once.
    folded = query.reshape(kv_heads, group * count, -1)
    if mask is not None and group > 1:
        mask = mask.expand(group, *mask.shape).reshape(group * count, -1)
    use_causal = causal and group == 1
    attended = F.scaled_dot_product_attention(
        folded[None],
        keys[None],
        values[None],
        attn_mask=None if use_causal else mask,
        is_causal=use_causal,
        scale=scaling,
    )
    return attended[0].reshape(heads, count, -1)


def _attend_explicit(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention spelled out, for what SDPA cannot do; long queries go in pieces, to bound the score matrix."""
    heads, count, _ = query.shape
    kv_heads, length, _ = keys.shape
    group = heads // kv_heads
    step = max(1, _SCORE_LIMIT // (heads * length))
    pieces = []
    for begin in range(0, count, step):
        part = query[:, begin : begin + step].reshape(kv_heads, -1, query.shape[-1])
        scores = (part @ keys.transpose(1, 2) * scaling).view(kv_heads, group, -1, length)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores + mask[begin : begin + step]
        if sinks is not None:
            sink = sinks.view(kv_heads, group, 1, 1).expand(-1, -1, scores.shape[2], 1).to(scores.dtype)
            probs = torch.cat([scores, sink], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
        else:
            probs = scores.softmax(dim=-1, dtype=torch.float32)
        attended = probs.to(values.dtype).view(kv_heads, -1, length) @ values
        pieces.append(attended.view(heads, -1, values.shape[-1]))
    return torch.cat(pieces, dim=1)


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

    Masks come from the site: its batch, and the window that was learnt from the model's own mask (see `masks`).
    """
    site = module.__dict__[SITE]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    return site.attend(query, key, value, scaling, site.window, softcap, s_aux), None


def register() -> None:
    """Makes the implementation known to Transformers. No mask function is registered, so no mask is ever built."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention_interface)
