"""One ragged forward: which tokens of which rows, where their KV goes, and what each may attend to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import attrs
import numpy as np
import torch

from specplug import native
from specplug.model.attention_plan import attention_plan
from specplug.model.attention_schedule import add_schedule
from specplug.model.blocks import BlockTable
from specplug.model.kv_cache import KVCache
from specplug.model.padded import PaddedRows, split_rows
from specplug.model.staging import stage
from specplug.native.triton_sizes import wanted_items


@attrs.frozen(eq=False)
class TreeMask:
    """What the new tokens of a row may see behind its linear prefix, and the positions of the entries there.

    Attributes:
        prefix: how many KV entries of the row are plain committed tokens, visible to all new tokens.
        visible: bool [new tokens, entries behind the prefix]: ancestors and self. The new tokens are the last entries.
        positions: the position of each entry behind the prefix (committed length + depth).
    """

    prefix: int
    visible: torch.Tensor
    positions: Sequence[int]

    @staticmethod
    def from_parents(prefix: int, parents: Sequence[int]) -> TreeMask:
        """The mask of a root token (the last committed one, at KV index `prefix`) followed by its draft tree.

        Args:
            prefix: KV entries before the root.
            parents: each node's parent as a node index, -1 for the root; parents come before their children.
        """
        count = len(parents) + 1
        visible = torch.zeros(count, count, dtype=torch.bool)
        visible[0, 0] = True
        positions = [prefix]
        for node, parent in enumerate(parents, start=1):
            visible[node] = visible[parent + 1]
            visible[node, node] = True
            positions.append(positions[parent + 1] + 1)
        return TreeMask(prefix, visible, positions)


@attrs.frozen(eq=False)
class ForwardRow:
    """The new tokens of one row.

    Attributes:
        tokens: ids to run; their KV is stored at KV indices `start`, `start + 1`, …
        start: the KV index of the first token; entries before it are computed. Also its position, unless `tree` is given.
        table: where the row's KV lies; it must hold `start + len(tokens)` entries.
        tree: for tokens that are not a plain continuation.
        first: KV entries before this index are not seen: they were never stored.
    """

    tokens: Sequence[int]
    start: int
    table: BlockTable
    tree: TreeMask | None = None
    first: int = 0

    @property
    def positions(self) -> Sequence[int]:
        """The position of each token."""
        if self.tree is None:
            return range(self.start, self.start + len(self.tokens))
        return self.tree.positions[len(self.tree.positions) - len(self.tokens) :]


@attrs.frozen(eq=False)
class RowView:
    """One row in one kind of layer: its queries, the KV entries they may see, and the mask over them.

    Attributes:
        first: the packed index of its first query.
        last: one behind its last query.
        begin: the first slot it sees, where its slots are one slice.
        end: one behind the last.
        slots: int64, the slots it sees, where they are not one slice; then `begin` and `end` say nothing.
        mask: additive [queries, entries], or None when all are seen.
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
            slots=None if table.contiguous else torch.tensor(list(self.slot_numbers)[low:], device=self._device),
            mask=mask,
            causal=self.causal and low == 0 and self.count > 1 and not (window and window < self.length),
        )

    def mask(self, window: int | None, dtype: torch.dtype) -> tuple[int, torch.Tensor | None]:
        """What the queries may see, shared by all layers with the same window.

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
        queries = torch.tensor(list(row.positions))[:, None]
        prefix = row.start if row.tree is None else row.tree.prefix
        low = min(low, prefix)
        keys = torch.arange(low, prefix)
        if row.tree is None:
            tail = torch.arange(row.start, self.length)
            behind = torch.ones(self.count, self.count, dtype=torch.bool).tril()
        else:
            tail = torch.tensor(list(row.tree.positions))
            behind = row.tree.visible
        allowed = torch.cat([torch.ones(self.count, len(keys), dtype=torch.bool), behind], dim=1)
        if window:
            allowed &= queries - torch.cat([keys, tail])[None, :] < window
        if bool(allowed.all()):
            return low, None
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))
        return low, mask.to(self._device, non_blocking=True)


class ForwardBatch:
    """Everything the layers of one forward share.

    Args:
        rows: the rows.
        cache: where their KV lies.
        logits_index: the packed positions to compute logits for; None for all.

    Attributes:
        num_tokens: tokens of all rows, T.
        wants_all: whether logits are computed for all positions.
        is_native: whether attention is native (see `specplug.native`), over `plan`; else it goes by `views` and `padded`.
    """

    def __init__(self, rows: Sequence[ForwardRow], cache: KVCache, logits_index: Sequence[int] | None = None) -> None:
        self._rows = rows
        self._device = cache.keys[0].device
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
    def num_logits(self) -> int:
        """L."""
        return len(self._host[3])

    @property
    def plan(self) -> torch.Tensor:
        """int32: the rows as native attention reads them (see `attention_plan`)."""
        return self._tensors[4]

    @cached_property
    def _tensors(self) -> list[torch.Tensor]:
        """Ids, positions, slots, logits index and plan, where the model is."""
        return self._on_gpu() if self._device.type == "cuda" else self._on_cpu()

    def _on_cpu(self) -> list[torch.Tensor]:
        plan = torch.from_numpy(attention_plan(self._rows)) if self.is_native else torch.empty(0, dtype=torch.int32)
        return [*(torch.tensor(values) for values in self._host), plan]

    def _on_gpu(self) -> list[torch.Tensor]:
        plan = self._scheduled(self.num_tokens) if self.is_native else np.empty(0, dtype=np.int32)
        return stage(self._host, plan, self._device)

    def stage(self, buffer: torch.Tensor, width: int, longest_plan: int) -> bool:
        """Puts the same into a buffer on the GPU, lists padded to `width`; False if the plan is too long for it."""
        plan = self._scheduled(width)
        if len(plan) > longest_plan:
            return False
        stage(self._host, plan, self._device, buffer, width)
        return True

    def _scheduled(self, width: int) -> np.ndarray:
        wanted = wanted_items(self._kv_heads, self._device)
        return add_schedule(attention_plan(self._rows), self._rows, width, wanted)

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
    keys = cache.keys[0]
    if keys.device.type == "cuda":
        return cache.suits_gpu_kernels
    return keys.dtype in (torch.float32, torch.bfloat16) and native.available()
