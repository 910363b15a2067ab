"""What an engine has in memory: weights, ranks, KV caches, buffers. `memory_plan.py` has planned all of it."""

from __future__ import annotations

from functools import partial

import torch

from specplug.engine.planning import PlannedEngine
from specplug.engine.startup.report import STEPS, OnStep, StepReport
from specplug.host.loading import allocate_caches, wants_top_k_at_drafts
from specplug.model.device import computes_ahead
from specplug.model.kv_cache import KVCache
from specplug.model.load.weights import load_model
from specplug.model.parallel.commands import RankSettings
from specplug.model.parallel.group import share_ids
from specplug.model.parallel.ranks import Ranks
from specplug.model.parallel.runner import LeadingCache, LeadingRunner
from specplug.model.pending import PendingTokens
from specplug.model.runner import ModelRunner
from specplug.speculation.target_states.store import TargetStateStore


def start_ranks(planned: PlannedEngine) -> Ranks:
    """Starts the other ranks of a tensor parallel target; they load their weights meanwhile."""
    config, plan = planned.config, planned.plan
    return Ranks(
        RankSettings(
            rank=0,
            size=config.tensor_parallel_size,
            folder=planned.folder,
            trust_remote_code=config.trust_remote_code,
            architecture=planned.architecture,
            dtype=planned.dtype,
            device=planned.device,
            num_blocks=plan.num_blocks,
            block_size=plan.block_size,
            runs_ahead=computes_ahead(planned.device),
        )
    )


def load_target(planned: PlannedEngine, ranks: Ranks | None) -> torch.nn.Module:
    """Loads the target's weights; an error of another rank explains one here."""
    try:
        return load_model(
            planned.folder,
            planned.model_config,
            planned.dtype,
            planned.device,
            towers=planned.architecture.towers,
            read_weights=planned.architecture.read_weights,
            trust_remote_code=planned.config.trust_remote_code,
            shards=planned.architecture.shards,
            num_ranks=planned.config.tensor_parallel_size,
            quantization=planned.config.quantization,
        )
    except Exception as error:
        if ranks is None:
            raise
        raise ranks.explain(error) from error


def load_drafts(planned: PlannedEngine, on_step: OnStep) -> None:
    """Loads what speculators asked for: models and weights of their own."""
    handles = planned.facade.handles
    for index, handle in enumerate(handles):

        def progress(fraction: float, done: int = index) -> None:
            on_step(StepReport(3, STEPS[2], fraction=(done + fraction) / len(handles)))

        handle.materialize(progress)


def allocate(
    planned: PlannedEngine, model: torch.nn.Module, ranks: Ranks | None
) -> tuple[ModelRunner, TargetStateStore, list[dict[str, KVCache]]]:
    """Makes the target's runner, the store of target states, and the speculators' KV caches."""
    plan, device = planned.plan, planned.device
    size = (planned.architecture.kv_layers, plan.num_blocks, plan.block_size, planned.dtype, device)
    boundaries = [b for speculator in planned.speculators for b in speculator.traits.hidden_states]
    rows = (planned.config.max_num_seqs, planned.num_held)
    pending = partial(PendingTokens, planned.num_entries, planned.architecture.vocab_size, device)
    if ranks is None:
        runner = ModelRunner(model, planned.architecture, KVCache(*size), device, boundaries, rows)
        runner.pending = pending() if computes_ahead(device) else None
    else:
        ranks.wait_until_ready()
        cache = LeadingCache(ranks, *size)
        runner = LeadingRunner(ranks, model, planned.architecture, cache, device, boundaries, rows)
        runner.pending = pending(share_ids) if computes_ahead(device) else None
    drafts_early = any(s.traits.drafts_early for s in planned.speculators) and not planned.registry.observes("propose")
    if runner.pending is not None and runner.states is None and drafts_early:
        most = planned.num_entries + 2 * planned.config.max_num_seqs
        runner.accepted = PendingTokens(most, planned.architecture.vocab_size, device)
    if planned.adapters is not None:
        runner.adapters = planned.adapters.allocate(model, device)
    states = TargetStateStore(
        planned.channels,
        planned.config.max_num_seqs,
        planned.max_num_batched_tokens,
        device,
        at_drafts=wants_top_k_at_drafts(planned.speculators),
    )
    caches = allocate_caches(
        planned.regions,
        planned.facade.handles,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        dtype=planned.dtype,
        device=device,
    )
    return runner, states, caches
