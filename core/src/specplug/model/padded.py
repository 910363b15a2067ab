"""Attention of many short rows in one kernel, for devices where launching one per row would cost more than padding.

On a CPU each row is a view of the cache and goes alone; on a GPU the rows that decode or verify are gathered, padded and
masked. Long prefill rows go alone on both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplug.model.forward import RowSpan

LONGEST_QUERY = 128


class PaddedRows:
    """The rows of a batch that are attended to together: R rows of at most Q queries against at most L entries."""

    def __init__(self, spans: Sequence[RowSpan], device: torch.device) -> None:
        self.spans = list(spans)
        self.device = device
        longest = max(span.length for span in spans)
        width = max(span.count for span in spans)
        slots = torch.zeros(len(spans), longest, dtype=torch.long)
        queries = torch.zeros(len(spans), width, dtype=torch.long)
        valid = torch.zeros(len(spans), width, dtype=torch.bool)
        for row, span in enumerate(spans):
            slots[row, : span.length] = torch.tensor(list(span.slot_numbers))
            queries[row, : span.count] = torch.arange(span.first, span.last)
            valid[row, : span.count] = True
        self._packed = queries[valid].to(device)
        self._lanes = valid.flatten().nonzero()[:, 0].to(device)
        self._queries = queries.to(device)
        self._slots = slots.to(device)
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [R, 1, Q, L]; a padded query sees entry 0, so that no row is masked out wholly."""
        key = (window, dtype)
        if key not in self._masks:
            rows, width = self._queries.shape
            mask = torch.full((rows, 1, width, self._slots.shape[1]), float("-inf"), dtype=dtype)
            for row, span in enumerate(self.spans):
                low, visible = span.mask(window, dtype)
                mask[row, 0, : span.count, low : span.length] = 0.0 if visible is None else visible.cpu()
                mask[row, 0, span.count :, 0] = 0.0
            self._masks[key] = mask.to(self.device)
        return self._masks[key]

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        window: int | None,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """Attends and writes into `out` [T, heads, value_dim]; `query` is [heads, T, key_dim], the caches head-first."""
        heads, kv_heads = query.shape[0], keys.shape[0]
        group = heads // kv_heads
        rows, width = self._queries.shape
        gathered = query[:, self._queries].transpose(0, 1)  # [R, heads, Q, key_dim]
        key = keys[:, self._slots].transpose(0, 1).repeat_interleave(group, dim=1)
        value = values[:, self._slots].transpose(0, 1).repeat_interleave(group, dim=1)
        mask = self.mask(window, query.dtype)
        if softcap is None and sinks is None:
            attended = torch.nn.functional.scaled_dot_product_attention(
                gathered, key, value, attn_mask=mask, scale=scaling
            )
        else:
            scores = gathered @ key.transpose(2, 3) * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores = scores + mask
            if sinks is not None:
                sink = sinks.view(1, heads, 1, 1).expand(rows, -1, width, 1).to(scores.dtype)
                probs = torch.cat([scores, sink], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
            else:
                probs = scores.softmax(dim=-1, dtype=torch.float32)
            attended = probs.to(value.dtype) @ value
        lanes = attended.transpose(1, 2).reshape(rows * width, heads, -1)
        out[self._packed] = lanes[self._lanes]
