"""What the speculators of a host take of memory."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.contract.resources import MemoryBudget, MemoryRegion, Resources
from specplug.errors import InsufficientMemoryError, PluginError
from specplug.host.limits import HostLimits
from specplug.host.loading import allocate_caches, max_nodes_of, plan_regions, row_buckets
from specplug.model.loop import plain_loop
from specplug.plugins.registry import RegisteredSpeculator
from specplug.plugins.target import TargetFacade
from specplug.speculation.target_states.store import TargetStateStore


class HostMemory:
    """The memory regions that speculators plan, for all rows at their longest.

    Args:
        speculators: asked for their regions.
        limits: the engine's sizes.
        target: the target as speculators see it.

    Attributes:
        planned_bytes: weights, KV caches and buffers.

    Raises:
        PluginError: a region needs block tables of the engine's.
        InsufficientMemoryError: they plan more than `limits.memory_bytes`.
    """

    def __init__(self, speculators: Sequence[RegisteredSpeculator], limits: HostLimits, target: TargetFacade) -> None:
        self._speculators = speculators
        self._limits = limits
        self._target = target
        self._regions = self._plan()
        self.planned_bytes = sum(self._bytes(region) for own in self._regions for region in own)
        if self.planned_bytes > limits.budget_bytes:
            raise InsufficientMemoryError(
                f"the speculators plan {self.planned_bytes:,} bytes for weights, caches and buffers, and memory_bytes is "
                f"{limits.budget_bytes:,}; raise it, or lower max_num_seqs or max_model_len"
            )

    def _plan(self) -> list[list[MemoryRegion]]:
        limits = self._limits
        budget = MemoryBudget(
            total_bytes=limits.budget_bytes,
            block_size=limits.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_model_len=limits.max_model_len,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            num_speculative_tokens=max(map(max_nodes_of, self._speculators)),
            dtype=self._target.dtype,
            shares_tables=False,
        )
        planned = [plan_regions(speculator, budget) for speculator in self._speculators]
        for speculator, regions in zip(self._speculators, planned, strict=True):
            for region in regions:
                if region.layers and region.tables == "shared":
                    raise PluginError(
                        f"speculator '{speculator.method}' plans the KV cache '{region.name}' with tables='shared': only "
                        "specplug's own engine has block tables to share; plan it with tables='own'"
                    )
        return planned

    def _bytes(self, region: MemoryRegion) -> int:
        tokens = self._limits.max_num_seqs * (self._limits.max_model_len + region.scratch_tokens_per_row)
        return region.fixed_bytes + tokens * region.bytes_per_token

    @property
    def _num_blocks(self) -> int:
        """Blocks for all rows at their longest, with what speculators write after the committed tokens."""
        if not any(region.layers for own in self._regions for region in own):
            return 0
        scratch = max((region.scratch_tokens_per_row for own in self._regions for region in own), default=0)
        return self._limits.max_num_seqs * -(-(self._limits.max_model_len + scratch) // self._limits.block_size)

    def allocate(self, states: TargetStateStore) -> list[Resources]:
        """Allocates it; returns what each speculator's `warmup` is given."""
        limits, target, num_blocks = self._limits, self._target, self._num_blocks
        caches = allocate_caches(
            self._regions,
            target.handles,
            num_blocks=num_blocks,
            block_size=limits.block_size,
            dtype=target.dtype,
            device=target.device,
        )
        return [
            Resources(
                device=target.device,
                block_size=limits.block_size,
                num_blocks=num_blocks,
                kv_caches=own,
                row_buckets=row_buckets(limits.max_num_seqs),
                compile_loop=plain_loop,
                hidden_states={b: states.delivery[b] for b in speculator.traits.hidden_states},
            )
            for speculator, own in zip(self._speculators, caches, strict=True)
        ]
