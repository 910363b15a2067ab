"""Makes an engine of what was planned and allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from specplug.contract.resources import Resources, no_compile
from specplug.engine.engine import Engine
from specplug.engine.fair_lock import FairLock
from specplug.engine.planning import PlannedEngine
from specplug.engine.prefix_cache import PrefixCache, Sharer
from specplug.engine.requests import RequestFactory
from specplug.engine.scheduler import Scheduler
from specplug.host.loading import max_nodes_of, row_buckets
from specplug.lora.registry import AdapterRegistry
from specplug.model.compile.compiled import compile_step
from specplug.model.compile.loops import compile_loop
from specplug.model.compile.runners import wants_compilation
from specplug.model.kv_cache import KVCache
from specplug.model.loop import plain_loop
from specplug.model.pending import PendingTokens
from specplug.model.runner import ModelRunner
from specplug.sampling.randomness import EngineRandomness
from specplug.sampling.workspace import Workspace
from specplug.speculation.adaptive import AdaptiveDraftLength
from specplug.speculation.adaptive.settings import AdaptiveSettings
from specplug.speculation.chain import SpeculatorChain
from specplug.speculation.draft_length import DraftLengthPolicy, FixedDraftLength
from specplug.speculation.target_states.store import TargetStateStore
from specplug.speculation.verification.dispatch import Verification
from specplug.speculation.verification.verifier import LosslessVerifier


def assemble(
    planned: PlannedEngine,
    runner: ModelRunner,
    states: TargetStateStore,
    caches: list[dict[str, KVCache]],
    tokenizer: Callable[[], Any],
    ends: frozenset[int],
) -> Engine:
    """Warms the speculators up, and connects all parts of an engine."""
    config, plan, architecture = planned.config, planned.plan, planned.architecture
    randomness = EngineRandomness(config.seed, planned.device)
    workspace = Workspace(planned.num_entries, architecture.vocab_size, planned.device)
    planned.registry.register_verifier(LosslessVerifier(randomness, config.chain_verification, workspace))
    is_auto = any(speculator.config.is_auto for speculator in planned.speculators)
    policy: DraftLengthPolicy = FixedDraftLength()
    if is_auto:
        runs_ahead = runner.pending is not None and runner.states is None
        settings = AdaptiveSettings.where_steps_run_ahead() if runs_ahead else AdaptiveSettings()
        policy = AdaptiveDraftLength(planned.speculators, settings)
    chain = SpeculatorChain(
        planned.speculators,
        states,
        policy,
        vocab_size=architecture.vocab_size,
        max_model_len=plan.max_model_len,
        max_num_batched_tokens=planned.max_num_batched_tokens,
        max_num_draft_tokens=config.max_num_draft_tokens,
        strict=config.strict,
        pending=runner.pending,
    )
    chain.warmup(_resources(planned, states, caches, runner.accepted))
    lock = FairLock()
    adapters = None
    if runner.adapters is not None and planned.adapters is not None:
        adapters = AdapterRegistry(runner.adapters, planned.adapters, lambda: lock)
        adapters.load_all(config.lora_modules)
    lookahead = max((max(s.scratch_tokens_per_row, max_nodes_of(s)) for s in planned.speculators), default=0)
    shared = [runner.cache]
    for regions, own in zip(planned.regions, caches, strict=True):
        shared += [own[region.name] for region in regions if region.layers and region.tables == "shared"]
    return Engine(
        planned,
        runner=runner,
        shared_caches=shared,
        chain=chain,
        states=states,
        requests=RequestFactory(
            plan, architecture, ends, randomness, tokenizer, planned.device, config.scheduling_policy
        ),
        verification=Verification(
            planned.registry, chain.speculators, workspace, randomness, architecture.vocab_size, strict=config.strict
        ),
        scheduler=Scheduler(
            plan.num_blocks,
            plan.block_size,
            config.max_num_seqs,
            planned.max_num_batched_tokens,
            lookahead,
            plan.max_model_len,
            PrefixCache(plan.block_size, _sharers(planned)) if planned.caches_prefixes else None,
        ),
        lock=lock,
        adapters=adapters,
    )


def _sharers(planned: PlannedEngine) -> list[Sharer]:
    """The speculators whose whole KV cache is addressed by the target's block tables."""
    tables = [{region.tables for region in own if region.layers} for own in planned.regions]
    return [
        Sharer(index, speculator.traits.needs_states)
        for index, (speculator, kinds) in enumerate(zip(planned.speculators, tables, strict=True))
        if kinds == {"shared"}
    ]


def _resources(
    planned: PlannedEngine,
    states: TargetStateStore,
    caches: Sequence[dict[str, KVCache]],
    accepted: PendingTokens | None,
) -> list[Resources]:
    """What each speculator's `warmup` is given."""
    config = planned.config
    compiles = wants_compilation(config.compile, planned.architecture.weight_bytes)
    loops = partial(compile_loop, most_rows=config.max_num_seqs, accepted=accepted) if compiles else plain_loop
    return [
        Resources(
            device=planned.device,
            block_size=planned.plan.block_size,
            num_blocks=planned.plan.num_blocks,
            kv_caches=own,
            row_buckets=row_buckets(config.max_num_seqs),
            hidden_states={b: states.delivery[b] for b in speculator.traits.hidden_states},
            compile=compile_step if compiles else no_compile,
            compile_loop=loops,
        )
        for speculator, own in zip(planned.speculators, caches, strict=True)
    ]
