"""The KV cache: block tables, the allocator of blocks, and the storage, one pair of tensors per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from specplug.contract.resources import KVLayer
from specplug.errors import PluginError
from specplug.model.device import to_device
from specplug.model.huge_pages import allocate
from specplug.model.prefix_index import PrefixIndex
from specplug.native.gpu import cuda

if TYPE_CHECKING:
    from specplug.contract.resources import Resources
    from specplug.contract.types import ProposalBatch


class BlockTable:
    """The blocks of one row: token i is in slot `blocks[i // block_size] * block_size + i % block_size`.

    Attributes:
        blocks: the row's block numbers, in token order.
        contiguous: whether the blocks follow each other, so that the row is one slice of every KV cache.
    """

    __slots__ = ("_numbers", "block_size", "blocks", "contiguous")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: list[int] = []
        self.contiguous = True
        self._numbers: np.ndarray | None = None

    @property
    def numbers(self) -> np.ndarray:
        """The block numbers, int32; kept until blocks come or go."""
        if self._numbers is None:
            self._numbers = np.array(self.blocks, dtype=np.int32)
        return self._numbers

    @property
    def capacity(self) -> int:
        """Tokens that fit the blocks held."""
        return len(self.blocks) * self.block_size

    def extend(self, blocks: Sequence[int]) -> None:
        """Appends blocks."""
        self._numbers = None
        for block in blocks:
            if self.blocks and block != self.blocks[-1] + 1:
                self.contiguous = False
            self.blocks.append(block)

    def truncate(self, count: int) -> list[int]:
        """Keeps the first `count` blocks and returns the others."""
        self._numbers = None
        removed = self.blocks[count:]
        del self.blocks[count:]
        self.contiguous = all(b == a + 1 for a, b in zip(self.blocks, self.blocks[1:], strict=False))
        return removed

    def slots(self, start: int, stop: int) -> Sequence[int]:
        """The KV slots of tokens [start, stop).

        Raises:
            PluginError: the row's blocks end before `stop`; `scratch_tokens_per_row` was planned too small.
        """
        if stop > self.capacity:
            raise PluginError(
                f"KV entries {start:,} to {stop - 1:,} of a row were asked for, and its blocks hold {self.capacity:,}: plan "
                "scratch_tokens_per_row for what propose writes after the committed tokens, in a MemoryRegion of plan_memory"
            )
        if self.contiguous:
            base = self.blocks[0] * self.block_size if self.blocks else 0
            return range(base + start, base + stop)
        size = self.block_size
        return [self.blocks[i // size] * size + i % size for i in range(start, stop)]


class OwnTables:
    """One block table for each row, for a speculator's KV caches with `tables="own"`; each has an equal part of the blocks.

    In an engine that shares no tables (`MemoryBudget.shares_tables`) that is enough for a row of `max_model_len` tokens and the
    planned `scratch_tokens_per_row`.

    Args:
        resources: of `warmup`.
        max_num_seqs: the most rows in a batch.
    """

    def __init__(self, resources: Resources, max_num_seqs: int) -> None:
        count = resources.num_blocks // max_num_seqs
        self._tables = [BlockTable(resources.block_size) for _ in range(max_num_seqs)]
        for row_id, table in enumerate(self._tables):
            table.extend(range(row_id * count, (row_id + 1) * count))

    def give(self, batch: ProposalBatch) -> None:
        """Sets `row.table` of every row. A new row's table still has the entries of an earlier row: write before you read."""
        for row in batch.rows:
            row.table = self._tables[row.row_id]


class BlockAllocator:
    """Hands out reference-counted blocks and prefers runs that follow each other.

    A row announces how many blocks it may need. The allocator starts it where that many blocks are free, and gives them to
    other rows only when no others are free, so that a row usually stays one contiguous slice.

    A block whose tokens are cached stays as it is when its last row releases it. It counts as free, and is evicted when no
    other block is free, the least recently used first.

    Attributes:
        num_blocks: all blocks.
        num_free: those that no row holds.
        cached: those that can be found by their tokens.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.cached = PrefixIndex()
        self._references = [0] * num_blocks
        self._free = np.ones(num_blocks, dtype=bool)  # no row holds it, and it is not cached
        self._unclaimed = np.ones(num_blocks, dtype=bool)  # free, and in no row's expected run

    def allocate(self, count: int, *, after: int | None = None, expected: int = 0) -> list[int] | None:
        """Takes `count` blocks, or returns None (and takes nothing) when fewer are free.

        Args:
            count: blocks to take.
            after: the row's last block; the one after it is preferred.
            expected: blocks the row may need in all, `count` included.
        """
        if count > self.num_free:
            return None
        shortage = count - (self.num_free - self.cached.num_idle)
        if shortage > 0:
            self.forget(self.cached.oldest(shortage))
        if after is not None:
            run = self._free[after + 1 : after + 1 + count]
            if len(run) == count and run.all():
                self._unclaimed[after + 1 : after + 1 + expected] = False
                return self._take(range(after + 1, after + 1 + count))
        start = self._find_run(self._unclaimed, max(count, expected))
        if start is None:
            start = self._find_run(self._free, count)
        if start is None:
            return self._take(np.flatnonzero(self._free)[:count].tolist())
        self._unclaimed[start : start + max(count, expected)] = False
        return self._take(range(start, start + count))

    @staticmethod
    def _find_run(mask: np.ndarray, length: int) -> int | None:
        """The start of the shortest run of True that is long enough, or of the longest if that is at least 1 long."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        fitting = np.flatnonzero(lengths >= length)
        if not len(fitting):
            return None
        return int(starts[fitting[lengths[fitting].argmin()]])

    def _take(self, blocks: Sequence[int]) -> list[int]:
        taken = list(blocks)
        self._free[taken] = False
        self._unclaimed[taken] = False
        for block in taken:
            self._references[block] = 1
        self.num_free -= len(taken)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Adds one holder to each block: blocks that a row holds, or cached ones."""
        for block in blocks:
            if self._references[block] == 0:
                self.cached.wake(block)
                self.num_free -= 1
            self._references[block] += 1

    def is_shared(self, block: int) -> bool:
        """Whether more than one row holds the block."""
        return self._references[block] > 1

    def count_free(self, blocks: Sequence[int]) -> int:
        """How many of some blocks no row holds."""
        return sum(self._references[block] == 0 for block in blocks)

    def forget(self, blocks: Sequence[int]) -> None:
        """Blocks are not found by their tokens any more."""
        for block in blocks:
            if self.cached.remove(block):
                self._free[block] = True
                self._unclaimed[block] = True

    def release(self, blocks: Sequence[int], *, claimed: int = 0) -> None:
        """Drops one holder of each block; blocks without a holder become free, the last ones of a row to be evicted first.

        Args:
            blocks: the blocks, in table order.
            claimed: how many blocks the row had announced; the part of its run that it never used becomes unclaimed.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self.num_free += 1
                if not self.cached.rest(block):
                    self._free[block] = True
                    self._unclaimed[block] = True
        if blocks and claimed > len(blocks):
            tail = slice(blocks[-1] + 1, blocks[-1] + 1 + claimed - len(blocks))
            self._unclaimed[tail] = self._free[tail]


class KVCache:
    """Keys [heads, slots, key_dim] and values [heads, slots, value_dim] of every layer.

    Heads come first, so that a row whose blocks are contiguous is, per head, one dense matrix: attention on a CPU reads it
    as a view, at the memory's speed. Entries start as zeros: a masked entry is multiplied by 0, which NaN would survive.
    """

    def __init__(
        self, layers: Sequence[KVLayer], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = num_blocks * block_size
        self.layers = tuple(layers)
        self.dtype = dtype
        self.device = device
        self.num_slots = slots
        self.keys = [_zeros((layer.num_heads, slots, layer.key_dim), dtype, device) for layer in layers]
        self.values = [_zeros((layer.num_heads, slots, layer.value_dim), dtype, device) for layer in layers]

    @property
    def most_heads(self) -> int:
        """KV heads of the layer that has most."""
        return max((layer.num_heads for layer in self.layers), default=1)

    @cached_property
    def suits_gpu_kernels(self) -> bool:
        """Whether it is on a GPU, and our own kernels can attend to it."""
        return (
            bool(self.keys)
            and self.keys[0].is_cuda
            and all(cuda.can_attend(tensor) for tensor in (*self.keys, *self.values))
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def move(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies the entries of slots `sources` to slots `destinations`, in every layer; the sets may overlap."""
        if not sources:
            return
        read, write = to_device(sources, self.device), to_device(destinations, self.device)
        for tensor in (*self.keys, *self.values):
            tensor.index_copy_(1, write, tensor.index_select(1, read))

    def clear(self, slots: Sequence[int]) -> None:
        """Sets the entries of slots to zero, in every layer."""
        index = to_device(slots, self.device)
        for tensor in (*self.keys, *self.values) if slots else ():
            tensor.index_fill_(1, index, 0)


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return allocate(math.prod(shape), dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)
