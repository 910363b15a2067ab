"""The memory a speculator plans for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import attrs

if TYPE_CHECKING:
    import torch

RegionKind = Literal["weights", "kv_cache", "buffers"]


@attrs.frozen
class KVLayer:
    """What one attention layer stores for one token.

    Attributes:
        num_heads: keys, and values, per token.
        key_dim: elements of a key.
        value_dim: elements of a value.
    """

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements(self) -> int:
        """Elements stored for one token."""
        return self.num_heads * (self.key_dim + self.value_dim)


@attrs.frozen
class MemoryRegion:
    """One use of memory by a speculator.

    Attributes:
        name: unique within the speculator; a KV cache is handed over in `resources.kv_caches` under it.
        kind: which part of the plan it belongs to.
        fixed_bytes: bytes that do not depend on the number of cached tokens.
        layers: for a KV cache, what each layer stores for one token.
        dtype: of the stored elements.
        scratch_tokens_per_row: KV entries beyond the committed tokens that `propose` writes (a tree drafter writes more
            than is verified); core reserves them in the row's table before it calls.
        tables: `shared`: the region is addressed by the target's block tables (`row.table`); `own`: the speculator
            keeps tables of its own.
        device: where it lies, if not on the target's device; it then has a budget of that device's own.
    """

    name: str
    kind: RegionKind
    fixed_bytes: int = 0
    layers: tuple[KVLayer, ...] = ()
    dtype: torch.dtype | None = None
    scratch_tokens_per_row: int = 0
    tables: Literal["shared", "own"] = "shared"
    device: torch.device | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one cached token costs in this region."""
        return sum(layer.elements for layer in self.layers) * (self.dtype.itemsize if self.dtype else 0)


@attrs.frozen
class MemoryBudget:
    """The limits that `plan_memory` plans for.

    Attributes:
        total_bytes: everything together must fit this.
        block_size: tokens of a KV block.
        max_num_seqs: rows in a batch.
        max_model_len: tokens of a row, prompt and output.
        max_num_batched_tokens: tokens in one target forward, drafts included.
        num_speculative_tokens: the most draft nodes of a row.
        dtype: the target's.
    """

    total_bytes: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    num_speculative_tokens: int
    dtype: torch.dtype

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return math.ceil(tokens / self.block_size)
