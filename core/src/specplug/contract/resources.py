"""What a speculator receives at warm-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch

    from specplug.contract.traits import Boundary
    from specplug.model.kv_cache import KVCache


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
    """

    device: torch.device
    block_size: int
    num_blocks: int
    kv_caches: Mapping[str, KVCache]
    row_buckets: tuple[int, ...]
    hidden_states: Mapping[Boundary, torch.Tensor] = attrs.field(factory=dict)
