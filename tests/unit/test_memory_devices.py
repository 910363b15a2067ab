"""A draft on another device is planned within that device's own memory, and bounds the common number of blocks."""

from __future__ import annotations

import pytest
import torch

from specplug.contract.resources import KVLayer, MemoryBudget, MemoryRegion
from specplug.engine import memory_plan as planning
from specplug.errors import InsufficientMemoryError

MIB = 1 << 20
OTHER = torch.device("cuda", 1)


def solve(monkeypatch: pytest.MonkeyPatch, there: int, device: torch.device | None) -> planning.MemoryPlan:
    monkeypatch.setattr(planning, "default_budget", lambda device: there)
    budget = MemoryBudget(
        total_bytes=64 * MIB,
        block_size=16,
        max_num_seqs=8,
        max_model_len=1024,
        max_num_batched_tokens=512,
        num_speculative_tokens=4,
        dtype=torch.float32,
    )
    regions = [
        MemoryRegion("weights", "weights", fixed_bytes=MIB, device=device),
        MemoryRegion("kv", "kv_cache", layers=(KVLayer(2, 32, 32),), dtype=torch.float32, device=device),
    ]
    return planning.solve(
        budget,
        target_weights=2 * MIB,
        target_kv_bytes_per_token=1024,
        regions=[("draft_model", region) for region in regions],
        buffers=0,
        context_length=1024,
        wanted_model_len=1024,
        device=torch.device("cpu"),
    )


def test_regions_elsewhere_do_not_count_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here = solve(monkeypatch, 64 * MIB, None)
    split = solve(monkeypatch, 64 * MIB, OTHER)
    assert (here.draft_weights, here.elsewhere) == (MIB, ())
    assert (split.draft_weights, split.draft_kv) == (0, 0)
    assert split.total_bytes == here.total_bytes - here.draft_weights - here.draft_kv
    assert split.elsewhere[0].device == "cuda:1"
    assert split.elsewhere[0].total_bytes(split.num_kv_tokens) == MIB + split.num_kv_tokens * 512


def test_the_smaller_device_bounds_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    plenty = solve(monkeypatch, 64 * MIB, OTHER)
    little = solve(monkeypatch, 2 * MIB, OTHER)
    assert little.num_blocks == MIB // (512 * 16) < plenty.num_blocks
    assert little.elsewhere[0].total_bytes(little.num_kv_tokens) <= 2 * MIB


def test_a_draft_that_does_not_fit_there_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"on cuda:1 for the draft, and 1\.1 MiB can be had there"):
        solve(monkeypatch, MIB + MIB // 8, OTHER)
