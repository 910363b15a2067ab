"""The memory plan: how many KV blocks fit the budget next to weights and buffers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Literal

import attrs
import torch

from specplug.contract.resources import MemoryBudget, MemoryRegion
from specplug.errors import InsufficientMemoryError

PART_NAMES = (
    "target weights",
    "target KV cache",
    "recurrent state",
    "draft weights",
    "draft KV cache",
    "verification buffers",
    "LoRA adapters",
    "loading",
)
_OPTIONAL_PARTS = frozenset({"recurrent state", "LoRA adapters", "loading"})
_CPU_SHARE = 0.5
_MANY = 1 << 40  # blocks of a model without attention, which take no memory
_CUDA_SHARE = 0.9


def format_bytes(count: int) -> str:
    """`1536` → `1.5 KiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@attrs.frozen
class OtherDevice:
    """Memory of speculators on a device other than the target's.

    Attributes:
        device: its name.
        budget_bytes: the budget there.
        fixed_bytes: weights and buffers.
        bytes_per_token: bytes of a cached token.
    """

    device: str
    budget_bytes: int
    fixed_bytes: int
    bytes_per_token: int

    def total_bytes(self, num_kv_tokens: int) -> int:
        """Total bytes with a cache of `num_kv_tokens`."""
        return self.fixed_bytes + num_kv_tokens * self.bytes_per_token


@attrs.frozen
class MemoryPlan:
    """The memory that will be allocated.

    Attributes:
        budget_bytes: the budget for everything.
        num_blocks: KV blocks.
        block_size: tokens of a block.
        max_model_len: the longest sequence.
        target_weights: bytes.
        target_kv: bytes.
        recurrent_state: bytes, for every row the same.
        draft_weights: bytes.
        draft_kv: bytes.
        buffers: bytes of step buffers, stored target states and plugins' buffers.
        step_bytes: the part of `buffers` that exists only during a step (activations, logits, CUDA graphs); 0 on a CPU.
        scratch_tokens_per_row: KV entries of a sequence in addition to its tokens, for drafting and verification.
        elsewhere: memory of speculators on other devices; the parts above are on the target's device.
        limited_by: what limits `max_model_len`: the model's `positions`, the user's `max_model_len`, or `memory`.
        context_length: the longest sequence that the target has positions for.
        adapters: bytes of the room for LoRA adapters.
        loading: bytes by which the peak of reading weights exceeds all other parts; most formats are read in place.
    """

    budget_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int
    target_weights: int
    target_kv: int
    draft_weights: int
    draft_kv: int
    buffers: int
    step_bytes: int = 0
    recurrent_state: int = 0
    scratch_tokens_per_row: int = 0
    elsewhere: tuple[OtherDevice, ...] = ()
    limited_by: Literal["positions", "max_model_len", "memory"] = "positions"
    context_length: int = 0
    adapters: int = 0
    loading: int = 0

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """(name, bytes) of the parts; recurrent state, adapters and loading only if there are any."""
        own, drafts = (self.target_weights, self.target_kv, self.recurrent_state), (self.draft_weights, self.draft_kv)
        named = zip(PART_NAMES, (*own, *drafts, self.buffers, self.adapters, self.loading), strict=True)
        return tuple((name, size) for name, size in named if size or name not in _OPTIONAL_PARTS)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(size for _, size in self.parts)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that fit the KV cache."""
        return self.num_blocks * self.block_size

    def num_sequences(self, length: int) -> int:
        """The number of sequences of `length` tokens, with scratch entries, that fit the KV cache at once."""
        return self.num_blocks // math.ceil((length + self.scratch_tokens_per_row) / self.block_size)


def solve(
    budget: MemoryBudget,
    *,
    target_weights: int,
    target_kv_bytes_per_token: int,
    regions: Sequence[tuple[str, MemoryRegion]],
    buffers: int,
    context_length: int,
    wanted_model_len: int | None,
    device: torch.device | None = None,
    step_bytes: int = 0,
    state_bytes_per_row: int = 0,
    adapters: int = 0,
    loading_bytes: int = 0,
) -> MemoryPlan:
    """Finds the number of KV blocks: the most that fit, up to what the engine can use.

    The engine can use `max_num_seqs` rows of the longest length with their draft and scratch entries.

    Args:
        budget: the limits.
        target_weights: bytes of the target's weights.
        target_kv_bytes_per_token: bytes of one cached token in the target.
        regions: the speculators' regions, each with its speculator's name.
        buffers: bytes of core's permanent buffers.
        context_length: the longest sequence that the target has positions for.
        wanted_model_len: the user's `max_model_len`; None lets the plan choose what fits.
        device: the target's. Regions on other devices are planned within those devices' budgets.
        step_bytes: bytes that exist only during a step.
        state_bytes_per_row: bytes of a row's recurrent state in the target.
        adapters: bytes of the room for LoRA adapters.
        loading_bytes: that reading the weights takes at its peak next to them, before anything else is allocated.

    Raises:
        InsufficientMemoryError: weights and buffers do not fit, or not one sequence of the wanted length.
    """
    elsewhere = _other_devices([region for _, region in regions if region.device not in (None, device)])
    owned = [(owner, region) for owner, region in regions if region.device in (None, device)]
    here = [region for _, region in owned]
    draft_weights = sum(region.fixed_bytes for region in here if region.kind == "weights")
    draft_fixed_kv = sum(region.fixed_bytes for region in here if region.kind == "kv_cache")
    buffers += step_bytes + sum(region.fixed_bytes for region in here if region.kind == "buffers")
    draft_kv_per_token = sum(region.bytes_per_token for region in here)
    scratch = max([budget.num_speculative_tokens + 1, *(region.scratch_tokens_per_row for region in here)])
    per_block = (target_kv_bytes_per_token + draft_kv_per_token) * budget.block_size
    recurrent_state = budget.max_num_seqs * state_bytes_per_row
    fixed = target_weights + recurrent_state + draft_weights + draft_fixed_kv + buffers + adapters
    left = budget.total_bytes - fixed
    loading_peak = target_weights + draft_weights + loading_bytes if loading_bytes else 0
    if loading_peak > budget.total_bytes:
        raise InsufficientMemoryError(
            f"reading the weights needs {format_bytes(loading_peak)} ({format_bytes(target_weights + draft_weights)} of "
            f"weights, {format_bytes(loading_bytes)} to dequantise them), and the budget is "
            f"{format_bytes(budget.total_bytes)}; raise memory, or take a smaller dtype or model"
        )
    longest = min(wanted_model_len or context_length, context_length)
    limited_by: Literal["positions", "max_model_len", "memory"]
    limited_by = "max_model_len" if longest < context_length else "positions"
    affordable = max(0, left // per_block) if per_block else (_MANY if left >= 0 else 0)
    needed = budget.blocks_for(longest + scratch)
    if affordable < needed:
        fitting = int(affordable * budget.block_size - scratch)
        if wanted_model_len is not None or fitting < budget.block_size:
            if wanted_model_len is None:  # the user did not ask for the whole context: one block is enough
                longest = min(longest, budget.block_size)
                needed = budget.blocks_for(longest + scratch)
            least = fixed + needed * per_block
            room = f"LoRA adapters {format_bytes(adapters)} (max_loras, max_lora_rank), " if adapters else ""
            raise InsufficientMemoryError(
                f"one sequence of {longest:,} tokens needs {format_bytes(least)} (target weights "
                f"{format_bytes(target_weights)}, "
                + (f"recurrent state {format_bytes(recurrent_state)}, " if recurrent_state else "")
                + f"draft weights {format_bytes(draft_weights)}, buffers "
                f"{format_bytes(buffers)}, {room}KV cache {format_bytes(draft_fixed_kv + needed * per_block)}), and the "
                f"budget is {format_bytes(budget.total_bytes)}; "
                + _largest_excess(budget, owned, longest, scratch, per_block, least)
                + "raise memory, or "
                + _levers(budget, target_weights + draft_weights, fitting)
            )
        longest, limited_by = fitting, "memory"
    useful = budget.max_num_seqs * budget.blocks_for(longest + scratch)
    num_blocks = int(min(affordable, useful))
    for other in elsewhere:
        there = (other.budget_bytes - other.fixed_bytes) // max(1, other.bytes_per_token * budget.block_size)
        if there < budget.blocks_for(longest + scratch):
            least = other.total_bytes(budget.blocks_for(longest + scratch) * budget.block_size)
            raise InsufficientMemoryError(
                f"one sequence of {longest:,} tokens needs {format_bytes(least)} on {other.device} for the draft, and "
                f"{format_bytes(other.budget_bytes)} can be had there; lower max_model_len or take a smaller draft"
            )
        num_blocks = min(num_blocks, there)
    tokens = num_blocks * budget.block_size
    total = fixed + num_blocks * per_block
    return MemoryPlan(
        budget_bytes=budget.total_bytes,
        num_blocks=num_blocks,
        block_size=budget.block_size,
        max_model_len=longest,
        target_weights=target_weights,
        target_kv=tokens * target_kv_bytes_per_token,
        draft_weights=draft_weights,
        draft_kv=draft_fixed_kv + tokens * draft_kv_per_token,
        buffers=buffers,
        step_bytes=step_bytes,
        recurrent_state=recurrent_state,
        scratch_tokens_per_row=scratch,
        elsewhere=tuple(elsewhere),
        limited_by=limited_by,
        context_length=context_length,
        adapters=adapters,
        loading=max(0, loading_peak - total),
    )


def _other_devices(regions: Sequence[MemoryRegion]) -> list[OtherDevice]:
    """The regions of other devices, summed per device."""
    by_device: dict[torch.device, list[MemoryRegion]] = {}
    for region in regions:
        assert region.device is not None
        by_device.setdefault(region.device, []).append(region)
    return [
        OtherDevice(
            device=str(device),
            budget_bytes=default_budget(device),
            fixed_bytes=sum(region.fixed_bytes for region in own),
            bytes_per_token=sum(region.bytes_per_token for region in own),
        )
        for device, own in by_device.items()
    ]


def _largest_excess(
    budget: MemoryBudget,
    owned: Sequence[tuple[str, MemoryRegion]],
    longest: int,
    scratch: int,
    per_block: int,
    least: int,
) -> str:
    """Names the drafts' KV entries or a speculator's region if the rest fits without it; else empty."""
    blocks = budget.blocks_for(longest + scratch)
    excess = least - budget.total_bytes
    if (blocks - budget.blocks_for(longest + 1)) * per_block >= excess:
        planned = [f"'{owner}'" for owner, region in owned if region.scratch_tokens_per_row == scratch]
        source = f"scratch_tokens_per_row of speculator {planned[0]}" if planned else "num_speculative_tokens"
        return f"{scratch:,} KV entries of each sequence are for drafts: lower {source}, "
    sizes = [
        (region.fixed_bytes + blocks * budget.block_size * region.bytes_per_token, owner, region.name)
        for owner, region in owned
    ]
    size, owner, name = max(sizes, default=(0, "", ""))
    if size < excess:
        return ""
    return f"{format_bytes(size)} of it are the region '{name}' of speculator '{owner}': make that smaller, "


def _levers(budget: MemoryBudget, weights: int, fitting: int) -> str:
    """The options that make the plan smaller."""
    if weights >= budget.total_bytes:
        return "take smaller weights or a smaller dtype"
    shorter = f"lower max_model_len (at most {fitting:,} fit), " if fitting > 0 else "lower "
    drafts = f"num_speculative_tokens (now {budget.num_speculative_tokens}), " if budget.num_speculative_tokens else ""
    return (
        f"{shorter}{drafts}max_num_seqs (now {budget.max_num_seqs}) or max_num_batched_tokens "
        f"(now {budget.max_num_batched_tokens})"
    )


def default_budget(device: torch.device, num_ranks: int = 1) -> int:
    """The budget of a rank if the user gives none: 90 % of its GPU's free memory, or its part of half of the host's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_SHARE)
    return int(_available_host_bytes() * _CPU_SHARE) // num_ranks


def _available_host_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
