"""The memory a speculator plans for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs

from specplug.values import as_tuple, expect, integer, one_of, shown

if TYPE_CHECKING:
    import torch

RegionKind = Literal["weights", "kv_cache", "buffers"]
TableKind = Literal["shared", "own"]


def _is_torch(name: str) -> Any:
    """A check for a value of one of torch's types, or None; torch is imported only where there is a value."""

    def holds(value: Any) -> bool:
        import torch

        return isinstance(value, getattr(torch, name))

    return expect(lambda value: value is None or holds(value), f"a torch.{name}, or None", ValueError)


@attrs.frozen
class KVLayer:
    """What one attention layer stores for one token.

    Attributes:
        num_heads: keys, and values, per token.
        key_dim: elements of a key.
        value_dim: elements of a value.

    Raises:
        ValueError: a value that is no positive integer.
    """

    num_heads: int = attrs.field(**integer(1, ValueError))
    key_dim: int = attrs.field(**integer(1, ValueError))
    value_dim: int = attrs.field(**integer(1, ValueError))

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
        layers: for a KV cache that core allocates, what each layer stores for one token.
        dtype: of the elements that `layers` store; needed with them.
        scratch_tokens_per_row: KV entries beyond the committed tokens that `propose` writes (a tree drafter writes more
            than is verified); core reserves them in the row's table before it calls.
        tables: `shared`: the region is addressed by the target's block tables (`row.table`); `own`: the speculator
            keeps tables of its own.
        device: where it lies, if not on the target's device; it then has a budget of that device's own.

    Raises:
        ValueError: a value of the wrong type or range, or layers without a dtype or in another kind than `kv_cache`.
    """

    name: str = attrs.field(
        validator=expect(lambda value: isinstance(value, str) and value != "", "a name", ValueError)
    )
    kind: RegionKind = attrs.field(**one_of(get_args(RegionKind), ValueError))
    fixed_bytes: int = attrs.field(default=0, **integer(0, ValueError))
    layers: tuple[KVLayer, ...] = attrs.field(
        default=(),
        converter=as_tuple,
        validator=expect(
            lambda value: isinstance(value, tuple) and all(isinstance(layer, KVLayer) for layer in value),
            "a tuple of KVLayers",
            ValueError,
        ),
    )
    dtype: torch.dtype | None = attrs.field(default=None, validator=_is_torch("dtype"))
    scratch_tokens_per_row: int = attrs.field(default=0, **integer(0, ValueError))
    tables: TableKind = attrs.field(default="shared", **one_of(get_args(TableKind), ValueError))
    device: torch.device | None = attrs.field(default=None, validator=_is_torch("device"))

    def __attrs_post_init__(self) -> None:
        if self.layers and self.kind != "kv_cache":
            raise ValueError(
                f"MemoryRegion: {self.name}: kind={shown(self.kind)} has layers: they belong to a 'kv_cache'"
            )
        if self.layers and self.dtype is None:
            raise ValueError(f"MemoryRegion: {self.name}: layers are given without dtype, that of their elements")

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
