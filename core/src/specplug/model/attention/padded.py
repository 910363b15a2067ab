"""Attention of many short rows in one kernel, where launching one per row would cost more than padding.

On a GPU the rows that decode or verify are gathered from the cache, padded and masked. On a CPU a gather would cost more than
it saves, but rows at equal distances in the cache (where the scheduler puts them while blocks are free) are one strided view of
it, so that only masking costs time. Long prefill rows are computed alone on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from specplug.model.attention.eager import RowSpan

LONGEST_QUERY = 128
_ROW_COST_TOKENS = 600  # one kernel call costs about as much as attending to so many cached tokens of a small model


class PaddedRows:
    """The rows of a batch that are attended to together: R rows of at most Q queries against at most L entries.

    Args:
        spans: the rows.
        device: where the cache is.
        stride: if the rows are one strided view of the cache, the distance of their first slots; they are given in the
            order of their slots. None gathers them.
    """

    def __init__(self, spans: Sequence[RowSpan], device: torch.device, stride: int | None) -> None:
        self.spans = list(spans)
        self.device = device
        self.stride = stride
        self.longest = max(span.length for span in spans)
        self.width = max(span.count for span in spans)
        counts = [span.count for span in spans]
        queries = [[span.first + min(i, span.count - 1) for i in range(self.width)] for span in spans]
        self._queries = torch.tensor(queries, device=device, dtype=torch.long)
        self._packed = torch.tensor(
            [span.first + i for span in spans for i in range(span.count)], device=device, dtype=torch.long
        )
        self._lanes = torch.tensor(
            [row * self.width + i for row, count in enumerate(counts) for i in range(count)],
            device=device,
            dtype=torch.long,
        )
        self._first_slot = spans[0].slot_numbers[0] if stride is not None else 0
        self._slots: torch.Tensor | None = None
        if stride is None:
            slots = torch.zeros(len(spans), self.longest, dtype=torch.long, device="cpu")
            for row, span in enumerate(spans):
                slots[row, : span.length] = torch.tensor(list(span.slot_numbers), dtype=torch.long, device="cpu")
            self._slots = slots.to(device)
        self._masks: dict[tuple[int | None, torch.dtype, int], torch.Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype, group: int) -> torch.Tensor:
        """Additive mask [R, 1, group * Q, L]; padding repeats a row's last query, so that no query is fully masked."""
        key = (window, dtype, group)
        if key not in self._masks:
            entries = torch.arange(self.longest, dtype=torch.long, device="cpu")
            starts = torch.tensor([span.start for span in self.spans], dtype=torch.long, device="cpu")
            lasts = torch.tensor([span.count - 1 for span in self.spans], dtype=torch.long, device="cpu")
            at = starts[:, None] + torch.minimum(
                torch.arange(self.width, dtype=torch.long, device="cpu")[None, :], lasts[:, None]
            )
            hidden = entries > at[..., None]
            if window:
                hidden |= entries <= at[..., None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device="cpu").masked_fill_(hidden, float("-inf"))
            for row, span in enumerate(self.spans):
                if span.hidden_before:
                    mask[row, :, : span.hidden_before] = float("-inf")
                if span.is_tree:
                    low, visible = span.mask(window, dtype)
                    mask[row] = float("-inf")
                    mask[row, : span.count, low : span.length] = 0.0 if visible is None else visible.cpu()
                    mask[row, span.count :] = mask[row, span.count - 1]
            folded = mask[:, None].expand(-1, group, -1, -1).reshape(len(self.spans), 1, -1, self.longest)
            self._masks[key] = folded.to(self.device)
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
        group, rows = heads // kv_heads, len(self.spans)
        gathered = query[:, self._queries].transpose(0, 1).reshape(rows, kv_heads, group * self.width, -1)
        key, value = self._read(keys), self._read(values)
        mask = self.mask(window, query.dtype, group)
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
                sink = sinks.view(1, kv_heads, group, 1, 1).expand(rows, -1, -1, self.width, 1)
                sink = sink.reshape(rows, kv_heads, -1, 1).to(scores.dtype)
                probs = torch.cat([scores, sink], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
            else:
                probs = scores.softmax(dim=-1, dtype=torch.float32)
            attended = probs.to(value.dtype) @ value
        lanes = attended.reshape(rows, heads, self.width, -1).transpose(1, 2).reshape(rows * self.width, heads, -1)
        out[self._packed] = lanes if len(lanes) == len(self._lanes) else lanes[self._lanes]

    def _read(self, cache: torch.Tensor) -> torch.Tensor:
        """[R, kv_heads, L, dim] of a cache [kv_heads, slots, dim]."""
        if self._slots is not None:
            return cache[:, self._slots].transpose(0, 1)
        assert self.stride is not None
        of_head, of_slot, of_element = cache.stride()
        return cache.as_strided(
            (len(self.spans), cache.shape[0], self.longest, cache.shape[2]),
            (self.stride * of_slot, of_head, of_slot, of_element),
            cache.storage_offset() + self._first_slot * of_slot,
        )


def split_rows(
    spans: list[RowSpan], device: torch.device, num_slots: int, *, gather: bool
) -> tuple[list[RowSpan], PaddedRows | None]:
    """Chooses the rows that are attended to together: (rows alone, rows together)."""
    short = [span for span in spans if span.count <= LONGEST_QUERY]
    if gather:
        long = [span for span in spans if span.count > LONGEST_QUERY]
        return long, PaddedRows(short, device, None) if short else None
    group, stride = _equally_spaced([span for span in short if span.is_contiguous], num_slots)
    if len(group) < 2:
        return spans, None
    longest = max(span.length for span in group)
    width = max(span.count for span in group)
    alone_cost = sum(_ROW_COST_TOKENS + span.length * span.count for span in group)
    if 2 * _ROW_COST_TOKENS + longest * width * len(group) > alone_cost:
        return spans, None
    together = set(map(id, group))
    return [span for span in spans if id(span) not in together], PaddedRows(group, device, stride)


def _equally_spaced(spans: list[RowSpan], num_slots: int) -> tuple[list[RowSpan], int]:
    """The longest run of rows whose first slots are at equal distances, and that distance."""
    ordered = sorted(spans, key=lambda span: span.slot_numbers[0])
    starts = [span.slot_numbers[0] for span in ordered]
    best, begin = (0, 0), 0
    for index in range(1, len(ordered)):
        if index - begin >= 2 and starts[index] - starts[index - 1] != starts[begin + 1] - starts[begin]:
            begin = index - 1
        if index + 1 - begin > best[1] - best[0]:
            best = (begin, index + 1)
    group = ordered[best[0] : best[1]]
    if len(group) < 2:
        return [], 0
    distances = {b - a for a, b in pairwise(starts[best[0] : best[1]])}
    longest = max(span.length for span in group)
    fits = starts[best[1] - 1] + longest <= num_slots
    return (group, distances.pop()) if fits and len(distances) == 1 else ([], 0)
