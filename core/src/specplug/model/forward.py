"""One ragged forward: which tokens of which rows, where their KV goes, and what each may attend to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import attrs
import torch

from specplug.model.blocks import BlockTable

if TYPE_CHECKING:
    from specplug.model.padded import PaddedRows


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
    """

    tokens: Sequence[int]
    start: int
    table: BlockTable
    tree: TreeMask | None = None

    @property
    def positions(self) -> Sequence[int]:
        """The position of each token."""
        if self.tree is None:
            return range(self.start, self.start + len(self.tokens))
        return self.tree.positions[len(self.tree.positions) - len(self.tokens) :]


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
    def view(self) -> tuple[int, int] | None:
        """The slice of slots that holds the row, if it is contiguous."""
        table = self._row.table
        if not table.contiguous:
            return None
        base = table.blocks[0] * table.block_size
        return base, base + self.length

    @property
    def slot_numbers(self) -> Sequence[int]:
        """The slots of all entries."""
        return self._row.table.slots(0, self.length)

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 [length]: the slots of all entries."""
        return torch.tensor(list(self.slot_numbers), device=self._device)

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
        low = max(0, oldest + 1 - window) if window else 0
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
    """Everything the layers of one forward share."""

    def __init__(self, rows: Sequence[ForwardRow], device: torch.device, *, pad_rows: bool) -> None:
        ids: list[int] = []
        positions: list[int] = []
        write: list[int] = []
        self.spans: list[RowSpan] = []
        for row in rows:
            self.spans.append(RowSpan(row, len(ids), device))
            ids.extend(row.tokens)
            positions.extend(row.positions)
            write.extend(row.table.slots(row.start, row.start + len(row.tokens)))
        self.num_tokens = len(ids)
        self.device = device
        self._pad_rows = pad_rows
        self._split: tuple[list[RowSpan], PaddedRows | None] | None = None
        self.input_ids = torch.tensor([ids], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.write_slots = torch.tensor(write, device=device)

    def split(self) -> tuple[list[RowSpan], PaddedRows | None]:
        """The rows that are attended to one by one, and those that are padded and attended to together."""
        if self._split is None:
            from specplug.model.padded import LONGEST_QUERY, PaddedRows

            short = [span for span in self.spans if self._pad_rows and span.count <= LONGEST_QUERY]
            long = [span for span in self.spans if span not in short] if short else self.spans
            self._split = long, PaddedRows(short, self.device) if short else None
        return self._split
