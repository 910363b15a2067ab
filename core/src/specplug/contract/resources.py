"""What a speculator runs on: memory, what is allocated, the target, and handles to checkpoints of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs

from specplug.values import as_tuple, expect, integer, one_of, shown

if TYPE_CHECKING:
    import torch

    from specplug.contract.types import Boundary
    from specplug.model.kv_cache import KVCache

RegionKind = Literal["weights", "kv_cache", "buffers"]
TableKind = Literal["shared", "own"]


def _is_torch(name: str) -> Any:
    """Makes a validator for an optional value of one of torch's types. It imports torch only if there is a value."""

    def holds(value: Any) -> bool:
        import torch

        return isinstance(value, getattr(torch, name))

    return expect(lambda value: value is None or holds(value), f"a torch.{name}, or None", ValueError)


@attrs.frozen
class KVLayer:
    """What one attention layer stores for one token.

    Attributes:
        num_heads: key-value heads.
        key_dim: elements of a key.
        value_dim: elements of a value.

    Raises:
        ValueError: a value is not a positive integer.
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
        name: unique within the speculator. `resources.kv_caches` has a KV cache under this name.
        kind: the part of the memory plan that it counts in.
        fixed_bytes: bytes that do not depend on the number of cached tokens.
        layers: for a KV cache that core allocates, what each layer stores for one token.
        dtype: the dtype of the KV cache; required with `layers`.
        scratch_tokens_per_row: KV entries that `propose` writes after a row's committed tokens. Core reserves slots for them
            in the row's block table. A drafter of trees may write more of them than are verified.
        tables: `shared`: the target's block tables (`row.table`) address the region; `own`: the speculator's own tables do.
            Rows that begin with the same tokens share blocks, and with them the entries of `shared` regions. So the entries of
            all positions that a row was shown must be written when `propose` returns, and an entry may depend only on the
            tokens up to its position; for a speculator that reads target states, also on the token after it.
        device: None means the target's device. Another device has a memory budget of its own.

    Raises:
        ValueError: a value has the wrong type or range, or there are layers without a dtype or in another kind than
            `kv_cache`.
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
                f"MemoryRegion: {self.name}: kind={shown(self.kind)} has layers: only a 'kv_cache' may have them"
            )
        if self.layers and self.dtype is None:
            raise ValueError(f"MemoryRegion: {self.name}: layers need a dtype")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one cached token in this region."""
        return sum(layer.elements for layer in self.layers) * (self.dtype.itemsize if self.dtype else 0)


@attrs.frozen
class MemoryBudget:
    """The limits that `plan_memory` plans for.

    Attributes:
        total_bytes: the memory for target, speculators, KV caches and buffers together.
        block_size: tokens of a KV block.
        max_num_seqs: the most rows in a batch.
        max_model_len: the most tokens of a row, prompt and output.
        max_num_batched_tokens: the most tokens in one target forward, drafts included.
        num_speculative_tokens: the most draft nodes of a row that any speculator of the chain may propose.
        dtype: the target's dtype.
        compiled_output_tokens: see `compiled_output_bytes`.
        loop_rows: rows of the largest batch that a CUDA graph of a loop holds, see `Resources.compile_loop`; 0 on a CPU. What a
            graph computes with stays allocated: plan it for `loop_tokens`.
        shares_tables: whether the engine has block tables for regions with `tables="shared"`. specplug's own has; in others,
            such as vLLM, plan `tables="own"`: `OwnTables` keeps them.
    """

    total_bytes: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    num_speculative_tokens: int
    dtype: torch.dtype
    compiled_output_tokens: int = 0
    loop_rows: int = 0
    shares_tables: bool = True

    def blocks_for(self, tokens: int) -> int:
        """The number of KV blocks that store `tokens` tokens."""
        return math.ceil(tokens / self.block_size)

    def compiled_output_bytes(self, bytes_per_token: int) -> int:
        """Bytes that the CUDA graphs of a step hold, to plan as `buffers`; 0 on a CPU. See `Resources.compile`.

        Args:
            bytes_per_token: bytes of the step's outputs for one token.
        """
        return self.compiled_output_tokens * bytes_per_token

    def loop_tokens(self, most: int) -> int:
        """New tokens of the largest batch that a CUDA graph of a loop of `most` outputs holds; 0 on a CPU."""
        return self.loop_rows * (1 + most)


StepCompiler = Callable[..., Any]
LoopCompiler = Callable[..., Any]


def no_compile(step: Callable[..., Any], *_: Any) -> Callable[..., Any]:
    """Returns the step itself: the `Resources.compile` of an engine that compiles nothing."""
    return step


@attrs.frozen(eq=False)
class Resources:
    """Everything that core allocated for one speculator. It is valid as long as the engine.

    Attributes:
        device: the device of the tensors.
        block_size: tokens of a KV block.
        num_blocks: blocks of every KV cache.
        kv_caches: the planned KV caches by region name.
        row_buckets: the numbers of rows to warm `propose` up for, ascending.
        hidden_states: the buffers that `batch.hidden_states` are slices of: [capacity, hidden] per declared boundary.
        compile: `compile(step, module, kv_cache, inputs)` → the compiled step if this engine compiles, else the step itself.
            A step is a function `(batch, *inputs) -> tensors` that runs a module over a `PagedBatch`, of which it may use
            `positions` and `attend`. All its weights are parameters and buffers of the module, on the cache's device. It may
            depend on values only through tensor operations. `inputs` are examples; the first dimension of inputs and outputs
            is the number of tokens, which varies. On a GPU small batches run as CUDA graphs, which hold outputs: plan
            `MemoryBudget.compiled_output_bytes`. Compiling overwrites the first slots of the cache.
        compile_loop: `compile_loop(begin, step, kv_cache, most, inputs)` → a loop that drafts up to `most` tokens a
            row, one after the other. `begin(batch, ids, last, *inputs) -> (state, output)` runs over the new tokens of
            all rows: their ids [T], for each row the index of its last token [R], and the tokens' entries of `inputs`,
            tensors that stay where they are (`hidden_states`, say). `step(batch, *state) -> (state, output)` runs one
            more token of every row. `state` and `output` are tensors [R, …], one output per step. Both steps use
            `positions` and `attend` of the batch, compiled steps and `ModelHandle.step`, and decide nothing by values
            on the host. Call the loop as `loop(rows, counts, places)`: the rows with their new tokens, how many outputs
            each needs (a row that needs none is run all the same), where each one's entries of `inputs` begin. It returns
            the outputs, [at least the most of counts, R, …], which the next call may overwrite. On a GPU it is one CUDA
            graph for up to 64 rows with at most 1 + `most` new tokens each; what rows have before those runs first, in a
            forward of its own. A `most` above the longest draft makes room for more new tokens.
            `ChainLoop` of the eagle plugin is an example.
    """

    device: torch.device
    block_size: int
    num_blocks: int
    kv_caches: Mapping[str, KVCache]
    row_buckets: tuple[int, ...]
    compile_loop: LoopCompiler
    hidden_states: Mapping[Boundary, torch.Tensor] = attrs.field(factory=dict)
    compile: StepCompiler = no_compile
