"""Paged attention for modules that a speculator brings itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from specplug.model.attention.interface import AttentionSite
from specplug.model.batch import ForwardBatch
from specplug.model.device import to_device
from specplug.model.kv_cache import KVCache
from specplug.model.rows import ForwardRow


class PagedBatch:
    """A ragged batch for a speculator's own attention layers, over a KV cache that it planned as a region.

    Make one per forward of your module, and call `attend` once per layer. Keys and values are stored first, so that tokens
    attend to themselves and each other by their rows' causal order or tree masks.

    Args:
        rows: as for `ModelHandle.forward`; of their tokens only the number matters here.
        cache: from `resources.kv_caches`.

    Attributes:
        num_tokens: tokens of all rows, T.
        input_ids: int64 [T], the rows' tokens.
        positions: int64 [T], the rows' positions.
        last: int64 [rows], the packed index of each row's last token.
    """

    def __init__(self, rows: Sequence[ForwardRow], cache: KVCache) -> None:
        self._batch = ForwardBatch(rows, cache)
        self._cache = cache
        self.num_tokens = self._batch.num_tokens
        self.input_ids = self._batch.input_ids[0]
        self.positions = self._batch.position_ids[0]
        counts = accumulate(len(row.tokens) for row in rows)
        self.last = to_device([end - 1 for end in counts], cache.device)

    @property
    def plan(self) -> torch.Tensor:
        """int32: the rows as native attention reads them."""
        return self._batch.plan

    @property
    def write_slots(self) -> torch.Tensor:
        """int64 [T]: where the KV of each token goes."""
        return self._batch.write_slots

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """Stores the new keys and values of a layer, then attends with every query to its row.

        Args:
            layer: index of the region's `layers`.
            query: [heads, T, key_dim], position-encoded.
            key: [kv_heads, T, key_dim], position-encoded.
            value: [kv_heads, T, value_dim].
            scaling: multiplies the scores.
            window: a query attends to keys fewer than this many positions back; None: to all.

        Returns:
            [T, heads, value_dim].
        """
        site = AttentionSite(self._cache.keys[layer], self._cache.values[layer])
        site.batch = self._batch
        return site.attend(query[None], key[None], value[None], scaling, window, None, None)[0]


def forward_batch(batch: PagedBatch) -> ForwardBatch:
    """The batch as a model's forward takes it."""
    return batch._batch
