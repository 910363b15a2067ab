"""The metrics of an engine, with the types and names of vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from specplug.stats import accepted_by_position

if TYPE_CHECKING:
    from specplug.engine.engine import Engine


@attrs.frozen
class Metric:
    """A named value."""

    name: str


@attrs.frozen
class Counter(Metric):
    """A value that only increases."""

    value: int


@attrs.frozen
class Gauge(Metric):
    """A current value."""

    value: float


@attrs.frozen
class Vector(Metric):
    """Counters by position."""

    values: list[int]


def engine_metrics(engine: Engine) -> list[Metric]:
    """Returns all metrics of an engine."""
    stats, scheduler = engine.stats, engine.scheduler
    allocator = scheduler.allocator
    prefixes = engine.prefix_cache
    return [
        Gauge("vllm:num_requests_running", len(scheduler.running)),
        Gauge("vllm:num_requests_waiting", len(scheduler.waiting)),
        Gauge("vllm:kv_cache_usage_perc", 1 - allocator.num_free / allocator.num_blocks),
        Counter("vllm:prefix_cache_queries", 0 if prefixes is None else prefixes.num_queried_tokens),
        Counter("vllm:prefix_cache_hits", 0 if prefixes is None else prefixes.num_hit_tokens),
        Counter("vllm:num_preemptions", scheduler.num_preemptions),
        Counter("vllm:prompt_tokens", engine.num_prompt_tokens),
        Counter("vllm:generation_tokens", engine.num_generated_tokens),
        Counter("vllm:spec_decode_num_drafts", stats.num_spec_steps),
        Counter("vllm:spec_decode_num_draft_tokens", stats.num_draft_tokens),
        Counter("vllm:spec_decode_num_accepted_tokens", stats.num_accepted_draft_tokens),
        Vector(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            accepted_by_position(stats.acceptance_histogram),
        ),
    ]
