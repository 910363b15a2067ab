"""PyTorch attention of one row: its slice of the KV cache, its mask, and the computation."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
import torch.nn.functional as F

from specplug.model.device import to_device
from specplug.model.rows import ForwardRow

_FOLD_LIMIT = 32
_SCORE_LIMIT = 1 << 26


@attrs.frozen(eq=False)
class RowView:
    """One row in one kind of layer: its queries, the KV entries they may attend to, and the mask over them.

    Attributes:
        first: the packed index of its first query.
        last: the packed index after its last query.
        begin: the first slot it attends to, where its slots are one slice.
        end: the slot after the last.
        slots: int64, the slots it attends to, where they are not one slice; then `begin` and `end` are unused.
        mask: additive [queries, entries], or None when all are visible.
        causal: whether the mask is SDPA's own causal one.
    """

    first: int
    last: int
    begin: int
    end: int
    slots: torch.Tensor | None
    mask: torch.Tensor | None
    causal: bool


class RowSpan:
    """One row of a forward as attention sees it: queries [first, last) of the packed batch against `length` KV entries."""

    def __init__(self, row: ForwardRow, first: int, device: torch.device) -> None:
        self.first = first
        self.count = len(row.tokens)
        self.last = first + self.count
        self.start = row.start
        self.length = row.start + self.count
        self._row = row
        self._device = device
        self._masks: dict[tuple[int | None, torch.dtype], tuple[int, torch.Tensor | None]] = {}

    @property
    def causal(self) -> bool:
        """Whether the row is a whole prefix: SDPA's own causal mask is then right."""
        return self.start == 0 and self._row.tree is None

    @property
    def hidden_before(self) -> int:
        """The first KV entry that was stored."""
        return self._row.first

    @property
    def is_tree(self) -> bool:
        """Whether the queries are not a plain continuation."""
        return self._row.tree is not None

    @property
    def is_contiguous(self) -> bool:
        """Whether the row is one slice of the cache."""
        return self._row.table.contiguous

    @property
    def slot_numbers(self) -> Sequence[int]:
        """The slots of all entries."""
        return self._row.table.slots(0, self.length)

    def view(self, window: int | None, dtype: torch.dtype) -> RowView:
        """What attention needs of this row in layers with this window."""
        low, mask = self.mask(window, dtype)
        table = self._row.table
        begin = table.blocks[0] * table.block_size if table.contiguous else 0
        return RowView(
            first=self.first,
            last=self.last,
            begin=begin + low,
            end=begin + self.length,
            slots=None if table.contiguous else to_device(self.slot_numbers[low:], self._device),
            mask=mask,
            causal=self.causal and low == 0 and self.count > 1 and not (window and window < self.length),
        )

    def mask(self, window: int | None, dtype: torch.dtype) -> tuple[int, torch.Tensor | None]:
        """The mask of the queries, shared by all layers with the same window.

        Returns:
            (first visible entry, additive mask [queries, length - first] or None when everything there is visible).
        """
        key = (window, dtype)
        if key not in self._masks:
            self._masks[key] = self._build_mask(window, dtype)
        return self._masks[key]

    def _build_mask(self, window: int | None, dtype: torch.dtype) -> tuple[int, torch.Tensor | None]:
        row = self._row
        oldest = min(row.positions)
        low = max(row.first, oldest + 1 - window) if window else row.first
        if row.tree is None and self.count == 1:
            return low, None
        queries = torch.tensor(list(row.positions), dtype=torch.long, device="cpu")[:, None]
        prefix = row.start if row.tree is None else row.tree.prefix
        low = min(low, prefix)
        keys = torch.arange(low, prefix, dtype=torch.long, device="cpu")
        if row.tree is None:
            tail = torch.arange(row.start, self.length, dtype=torch.long, device="cpu")
            tail_mask = torch.ones(self.count, self.count, dtype=torch.bool, device="cpu").tril()
        else:
            tail = torch.tensor(list(row.tree.positions), dtype=torch.long, device="cpu")
            tail_mask = row.tree.visible
        allowed = torch.cat([torch.ones(self.count, len(keys), dtype=torch.bool, device="cpu"), tail_mask], dim=1)
        if window:
            allowed &= queries - torch.cat([keys, tail])[None, :] < window
        if bool(allowed.all()):
            return low, None
        mask = torch.zeros(allowed.shape, dtype=dtype, device="cpu").masked_fill_(~allowed, float("-inf"))
        return low, mask.to(self._device, non_blocking=True)


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
        causal: the mask is SDPA's own causal one (then q == L); faster than the same mask as a tensor.

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
    """Attention as explicit matmuls, for what SDPA cannot do; long queries are split, to bound the score matrix."""
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
