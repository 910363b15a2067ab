"""Loading speculators by configuration, for any engine: the plugins, their traits, memory, weights and warm-up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs
import torch

from specplug.contract.resources import MemoryBudget, MemoryRegion
from specplug.contract.settings import SpeculativeConfig
from specplug.errors import PluginError, SpecplugError
from specplug.model.kv_cache import KVCache
from specplug.plugins.lazy_model import LazyModel
from specplug.plugins.registry import PluginRegistry, RegisteredSpeculator
from specplug.values import as_integer, is_integer, shown


def load_speculators(
    registry: PluginRegistry, config: SpeculativeConfig | None, target: Any
) -> list[RegisteredSpeculator]:
    """Makes the speculators of a configuration and its fallbacks, in the order in which they are asked.

    Raises:
        PluginError: a method is not installed or cannot be loaded, or its plugin violates the contract.
        ConfigurationError: a plugin does not accept its settings.
    """
    return [registry.load_speculator(bounded(each, registry.plugin(each.method)), target) for each in _chain(config)]


def _chain(speculative: SpeculativeConfig | None) -> Iterator[SpeculativeConfig]:
    while speculative is not None:
        yield speculative
        speculative = speculative.fallback


def bounded(config: SpeculativeConfig, plugin: Any) -> SpeculativeConfig:
    """The configuration, with the plugin's bound on draft lengths if core chooses them and the user gave no bound.

    Raises:
        PluginError: the plugin's attribute `max_num_speculative_tokens` is not a positive integer.
    """
    most = as_integer(getattr(plugin, "max_num_speculative_tokens", None))
    if most is None or config.is_bounded:
        return config
    if not is_integer(most, 1):
        raise PluginError(
            f"plugin '{config.method}': max_num_speculative_tokens={shown(most)}: expected an integer of at least 1"
        )
    return attrs.evolve(config, num_speculative_tokens=most)


def max_nodes_of(speculator: RegisteredSpeculator) -> int:
    """The maximum number of draft nodes of a row."""
    return speculator.traits.max_nodes or speculator.config.num_speculative_tokens


def wants_top_k_at_drafts(speculators: Sequence[RegisteredSpeculator]) -> bool:
    """Whether any speculator declares `top_k_at_drafts`."""
    return any(speculator.traits.top_k_at_drafts for speculator in speculators)


def check_traits(speculator: RegisteredSpeculator, num_layers: int, vocab_size: int) -> None:
    """Refuses traits that a target cannot provide.

    Raises:
        PluginError: a boundary after the last layer, or a top_k larger than the vocabulary.
    """
    traits = speculator.traits
    for boundary in traits.hidden_states:
        if boundary != "final" and boundary > num_layers:
            raise PluginError(
                f"speculator '{speculator.method}' declares traits.hidden_states with boundary {boundary}; the target has "
                f"boundaries 0 to {num_layers}, and 'final'"
            )
    if traits.top_k > vocab_size:
        raise PluginError(
            f"speculator '{speculator.method}' declares traits.top_k={traits.top_k:,}; the target's vocabulary has "
            f"{vocab_size:,} tokens"
        )


def plan_regions(speculator: RegisteredSpeculator, budget: MemoryBudget) -> list[MemoryRegion]:
    """Asks a speculator for its memory regions.

    Raises:
        PluginError: its `plan_memory` raised, or returned something else than regions of different names.
    """
    where = f"speculator '{speculator.method}'"
    try:
        planned = speculator.plan_memory(budget=budget)
        regions = [] if planned is None else planned
        if not isinstance(regions, (list, tuple)) or not all(isinstance(each, MemoryRegion) for each in regions):
            raise PluginError(f"{where}: plan_memory returned {shown(planned)}, expected a list of MemoryRegions")
    except SpecplugError:
        raise
    except Exception as error:
        raise PluginError(f"{where} failed in plan_memory: {type(error).__name__}: {error}") from error
    names = [region.name for region in regions]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PluginError(f"{where}: plan_memory returned two regions named '{twice}'")
    speculator.scratch_tokens_per_row = max((region.scratch_tokens_per_row for region in regions), default=0)
    return list(regions)


def allocate_caches(
    regions: Iterable[Sequence[MemoryRegion]],
    handles: Iterable[Any],
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[dict[str, KVCache]]:
    """Allocates the KV caches that each speculator planned, by region name, and connects core's models with theirs."""
    caches = [
        {
            region.name: KVCache(region.layers, num_blocks, block_size, region.dtype or dtype, region.device or device)
            for region in own
            if region.layers or (region.kind == "kv_cache" and region.dtype)  # a model without attention has no layers
        }
        for own in regions
    ]
    for handle in handles:
        for own_caches in caches:
            if isinstance(handle, LazyModel):
                handle.bind(own_caches)
    return caches


def row_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """The numbers of rows to warm up for: powers of two, and the most."""
    buckets = [1]
    while buckets[-1] < max_num_seqs:
        buckets.append(min(buckets[-1] * 2, max_num_seqs))
    return tuple(buckets)
