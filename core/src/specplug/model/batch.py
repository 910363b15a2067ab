"""The inputs of one ragged forward, packed: ids, positions, write slots, logits index and attention plan."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from specplug import native
from specplug.model.attention.eager import RowSpan, RowView
from specplug.model.attention.padded import PaddedRows, split_rows
from specplug.model.attention.plan import PlanPiece, attention_plan, scheduled_plan
from specplug.model.kv_cache import KVCache
from specplug.model.rows import ForwardRow
from specplug.model.staging import StagedInputs, stage
from specplug.native.gpu.sizes import wanted_items


class ForwardBatch:
    """Everything the layers of one forward share.

    Args:
        rows: the rows.
        cache: the KV cache that holds them.
        logits_index: the packed positions to compute logits for; None for all.

    Attributes:
        num_tokens: tokens of all rows, T.
        wants_all: whether logits are computed for all positions.
        is_native: whether attention is native (see `specplug.native`), over `plan`; else it uses `views` and `padded`.
    """

    def __init__(self, rows: Sequence[ForwardRow], cache: KVCache, logits_index: Sequence[int] | None = None) -> None:
        self._rows = rows
        self._device = cache.device
        self._num_slots = cache.num_slots
        self._kv_heads = cache.most_heads
        ids: list[int] = []
        positions: list[int] = []
        write: list[int] = []
        for row in rows:
            ids.extend(row.tokens)
            positions.extend(row.positions)
            write.extend(row.table.slots(row.start, row.start + len(row.tokens)))
        self.num_tokens = len(ids)
        index = range(len(ids)) if logits_index is None else list(logits_index) or [0]
        self.wants_all = list(index) == list(range(len(ids)))
        self._host = (ids, positions, write, index)
        self.is_native = can_attend_natively(cache)
        self._views: dict[tuple[int | None, torch.dtype], list[RowView]] = {}

    @property
    def input_ids(self) -> torch.Tensor:
        """int64 [1, T]."""
        return self._tensors[0][None]

    @property
    def position_ids(self) -> torch.Tensor:
        """int64 [1, T]."""
        return self._tensors[1][None]

    @property
    def write_slots(self) -> torch.Tensor:
        """int64 [T], where the KV of each token goes."""
        return self._tensors[2]

    @property
    def logits_index(self) -> torch.Tensor:
        """int64 [L], the packed positions to compute logits for; at least one."""
        return self._tensors[3]

    @property
    def has_placeholders(self) -> bool:
        """Whether any id is one of `PendingTokens`."""
        return bool(self._host[0]) and min(self._host[0]) < 0

    @property
    def num_logits(self) -> int:
        """L."""
        return len(self._host[3])

    @property
    def plan(self) -> torch.Tensor:
        """int32: the rows as native attention reads them (see `attention.plan`)."""
        return self._tensors[4]

    @property
    def step_inputs(self) -> list[torch.Tensor]:
        """Positions [T], plan, write slots, ids [T] and logits index: a forward's inputs as a step over tensors."""
        ids, positions, slots, index, plan = self._tensors
        return [positions, plan, slots, ids, index]

    @cached_property
    def _tensors(self) -> list[torch.Tensor]:
        """Ids, positions, slots, logits index and plan, where the model is."""
        return self._on_gpu() if self._device.type == "cuda" else self._on_cpu()

    def _on_cpu(self) -> list[torch.Tensor]:
        plan = (
            torch.from_numpy(attention_plan(self._rows))
            if self.is_native
            else torch.empty(0, dtype=torch.int32, device="cpu")
        )
        numbers = np.array([value for values in self._host for value in values], dtype=np.int64)
        return [*torch.from_numpy(numbers).split([len(values) for values in self._host]), plan]

    def _on_gpu(self) -> list[torch.Tensor]:
        return stage(self._host, self._scheduled(self.num_tokens) if self.is_native else [], self._device)

    def stage(self, inputs: StagedInputs, width: int) -> bool:
        """Writes the same to where a captured forward takes it from, lists padded to `width`; False if it does not fit."""
        return inputs.write(self._host, width, self._scheduled(width))

    def _scheduled(self, width: int) -> list[PlanPiece]:
        return scheduled_plan(self._rows, width, wanted_items(self._kv_heads, self._device))

    @cached_property
    def spans(self) -> list[RowSpan]:
        """The rows as PyTorch's attention is called for them."""
        spans, first = [], 0
        for row in self._rows:
            spans.append(RowSpan(row, first, self._device))
            first += len(row.tokens)
        return spans

    @cached_property
    def _split(self) -> tuple[list[RowSpan], PaddedRows | None]:
        return split_rows(self.spans, self._device, self._num_slots, gather=self._device.type != "cpu")

    @property
    def padded(self) -> PaddedRows | None:
        """The rows that are attended to together."""
        return self._split[1]

    def views(self, window: int | None, dtype: torch.dtype) -> list[RowView]:
        """The rows that are attended to one by one; the same for all layers with the same window."""
        key = (window, dtype)
        if key not in self._views:
            self._views[key] = [span.view(window, dtype) for span in self._split[0]]
        return self._views[key]


def can_attend_natively(cache: KVCache) -> bool:
    """Whether native attention serves this cache."""
    if cache.device.type == "cuda":
        return cache.suits_gpu_kernels
    return bool(cache.keys) and cache.dtype in (torch.float32, torch.bfloat16) and native.available()
