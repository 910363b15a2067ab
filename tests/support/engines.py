"""What tests do with an engine from outside."""

from __future__ import annotations

from specplug import LLM
from specplug.model.kv_cache import BlockAllocator


def squeeze_blocks(llm: LLM, count: int) -> BlockAllocator:
    """Leaves the engine with few KV blocks, so that rows must be preempted."""
    assert count <= llm.engine.plan.num_blocks
    llm.engine.scheduler.allocator = BlockAllocator(count)
    return llm.engine.scheduler.allocator


def assert_idle(llm: LLM) -> None:
    """Nothing runs, and all blocks and slots are free."""
    scheduler = llm.engine.scheduler
    assert not llm.engine.has_unfinished_requests
    assert scheduler.allocator.num_free == scheduler.allocator.num_blocks
    assert len(scheduler._free_slots) == llm.config.max_num_seqs
