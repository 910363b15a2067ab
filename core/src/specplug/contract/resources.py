"""What a speculator receives at warm-up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    import torch

    from specplug.contract.traits import Boundary
    from specplug.model.kv_cache import KVCache

StepCompiler = Callable[..., Any]
MOST_CAPTURED = 64
CAPTURED_TOKENS = 217
"""Tokens of the largest batch of a speculator's own step that is a CUDA graph, and of all such batches together."""


def leave_as_it_is(step: Callable[..., Any], *_: Any) -> Callable[..., Any]:
    """What compiles a step where the engine compiles nothing."""
    return step


@attrs.frozen(eq=False)
class Resources:
    """Everything allocated for one speculator. Keep it; it lives as long as the engine.

    Attributes:
        device: where the tensors live.
        block_size: tokens of a KV block.
        num_blocks: blocks of every KV cache.
        kv_caches: the planned KV caches by region name.
        row_buckets: the numbers of rows that `propose` will be warmed for, ascending.
        hidden_states: the fixed buffers behind `batch.hidden_states`, [capacity, hidden] per declared boundary.
        compile: `compile(step, module, kv_cache, inputs)` → your step as machine code where this engine compiles, else the
            step itself. A step is a function `(batch, *inputs) -> tensors` that runs your module over a `PagedBatch`, of which
            it may use `positions` and `attend`; all its weights are the module's parameters and buffers, on the cache's device.
            `inputs` are examples whose first dimension, the tokens, is free, as is that of every output. It must depend on
            values only through tensor operations. On a GPU batches of up to 64 tokens are CUDA graphs, which hold the outputs
            of `CAPTURED_TOKENS` tokens: plan these as `buffers`. The first slots of the cache are overwritten.
    """

    device: torch.device
    block_size: int
    num_blocks: int
    kv_caches: Mapping[str, KVCache]
    row_buckets: tuple[int, ...]
    hidden_states: Mapping[Boundary, torch.Tensor] = attrs.field(factory=dict)
    compile: StepCompiler = leave_as_it_is
