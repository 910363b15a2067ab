"""Starts an engine in six steps. Each step is timed and reported. If one fails, the earlier ones are undone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug import native, threads
from specplug.config.engine import EngineConfig
from specplug.contract.resources import Resources, no_compile
from specplug.engine.engine import Engine
from specplug.engine.fair_lock import FairLock
from specplug.engine.planning import PlannedEngine, plan_engine
from specplug.engine.prefix_cache import PrefixCache, Sharer
from specplug.engine.requests import RequestFactory
from specplug.engine.scheduler import Scheduler
from specplug.errors import SpecplugError, StartupError
from specplug.host.loading import allocate_caches, max_nodes_of, row_buckets, wants_top_k_at_drafts
from specplug.lora.registry import AdapterRegistry
from specplug.model.compile.compiled import compile_step
from specplug.model.compile.loops import compile_loop
from specplug.model.compile.runners import compile_forwards, wants_compilation
from specplug.model.device import computes_ahead
from specplug.model.kv_cache import KVCache
from specplug.model.load.checkpoint import resolve_checkpoint
from specplug.model.load.parity import check_parity
from specplug.model.load.tokenizer import check_tokenizer
from specplug.model.load.weights import load_model
from specplug.model.loop import plain_loop
from specplug.model.parallel.commands import RankSettings
from specplug.model.parallel.group import share_ids
from specplug.model.parallel.ranks import Ranks
from specplug.model.parallel.runner import LeadingCache, LeadingRunner
from specplug.model.parallel.torchrun import join_first_rank, launched_rank, meeting_folder
from specplug.model.parallel.worker import serve_rank
from specplug.model.pending import PendingTokens
from specplug.model.runner import ModelRunner
from specplug.model.torch_state import own_torch_state
from specplug.plugins.target import LazyModel
from specplug.sampling.defaults import eos_ids
from specplug.sampling.randomness import EngineRandomness
from specplug.sampling.workspace import Workspace
from specplug.speculation.adaptive import AdaptiveDraftLength
from specplug.speculation.chain import SpeculatorChain
from specplug.speculation.draft_length import DraftLengthPolicy, FixedDraftLength
from specplug.speculation.target_states.store import TargetStateStore
from specplug.speculation.verification.dispatch import Verification
from specplug.speculation.verification.verifier import LosslessVerifier
from specplug.tiny import resolve_model

STEPS = (
    "plan from configuration and headers",
    "load target weights",
    "load draft weights",
    "allocate KV cache and buffers",
    "warm up",
    "ready",
)
COMPILATION = "compile native kernels (once)"


@attrs.frozen
class StepReport:
    """The progress of one startup step.

    Attributes:
        number: 1 to 6; 0 for the compilation of the native kernels, once, within the first step.
        name: the step's name.
        seconds: its duration; None while it runs.
        fraction: the part of it that is done, between 0 and 1.
        elapsed: seconds since it began, if no fraction is known.
    """

    number: int
    name: str
    seconds: float | None = None
    fraction: float = 0.0
    elapsed: float = 0.0


OnStep = Callable[[StepReport], None]
_starting = threading.RLock()
"""One start at a time: loading and compiling change process-wide state, such as PyTorch's default dtype."""


def start_engine(
    config: EngineConfig, *, tokenizer: Callable[[], Any] = lambda: None, on_step: OnStep = lambda report: None
) -> Engine:
    """Starts an engine.

    Args:
        config: what to run and how.
        tokenizer: gives the target's tokenizer to speculators that request it.
        on_step: called at the beginning, during, and at the end of every step.

    Raises:
        SpecplugError: names the failed step, the cause, and what to change.
        SystemExit: this process was a rank after the first, started by torchrun, and the first one's engine has ended.
    """
    if launched_rank(config.tensor_parallel_size):
        serve_rank(join_first_rank(meeting_folder()))
        raise SystemExit(0)
    with own_torch_state(), _starting, ExitStack() as undo:
        with _step(1, on_step) as clock:
            planned = plan_engine(config, tokenizer=tokenizer, before_kernels=lambda: _compile_kernels(on_step, clock))
            undo.callback(planned.facade.close)
            if not config.skip_tokenizer_init:
                check_tokenizer(_tokenizer_folder(planned))
            if planned.device.type == "cpu":
                threads.warn_of_too_many()
            ends = eos_ids(planned.folder, planned.model_config, planned.architecture.vocab_size)
        ranks: Ranks | None = None
        with _step(2, on_step):
            if config.tensor_parallel_size > 1:
                ranks = _start_ranks(planned)
                undo.callback(ranks.close)
            model = _load_target(planned, ranks)
            planned.facade.attach(model)
        with _step(3, on_step):
            _load_drafts(planned, on_step)
        with _step(4, on_step):
            runner, states, caches = _allocate(planned, model, ranks)
            undo.callback(runner.close)
        with _step(5, on_step):
            if config.check_parity:
                check_parity(
                    runner, planned.model_config, config.block_size, trust_remote_code=config.trust_remote_code
                )
            if wants_compilation(config.compile, planned.architecture.weight_bytes):
                drafts = [h.runner for h in planned.facade.handles if isinstance(h, LazyModel) and h.runner]
                if ranks is not None:
                    ranks.order("compile", planned.most_captured, planned.num_entries)
                compile_forwards([runner, *drafts], planned.most_captured, planned.num_entries)
            engine = _assemble(planned, runner, states, caches, tokenizer, ends)
        with _step(6, on_step):
            undo.pop_all()
        return engine


@attrs.define
class _Clock:
    """Seconds of a step that are reported as another step."""

    left_out: float = 0.0


def _compile_kernels(on_step: OnStep, clock: _Clock) -> None:
    """Compiles the native kernels if necessary, and reports that as a step of its own within the first."""
    if not native.must_be_compiled():
        return
    report = StepReport(0, COMPILATION)
    on_step(report)
    started = time.perf_counter()
    native.load(lambda seconds: on_step(attrs.evolve(report, elapsed=seconds)))
    clock.left_out = time.perf_counter() - started
    on_step(StepReport(0, COMPILATION, clock.left_out, 1.0))
    on_step(StepReport(1, STEPS[0]))


@contextmanager
def _step(number: int, on_step: OnStep) -> Iterator[_Clock]:
    name = STEPS[number - 1]
    on_step(StepReport(number, name))
    started = time.perf_counter()
    clock = _Clock()
    try:
        yield clock
    except SpecplugError as error:
        error.add_note(f"startup step {number} of {len(STEPS)}: {name}")
        raise
    except Exception as error:
        raise StartupError(f"startup step {number} of 6 ({name}) failed: {type(error).__name__}: {error}") from error
    on_step(StepReport(number, name, time.perf_counter() - started - clock.left_out, 1.0))


def _start_ranks(planned: PlannedEngine) -> Ranks:
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


def _load_target(planned: PlannedEngine, ranks: Ranks | None) -> torch.nn.Module:
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


def _load_drafts(planned: PlannedEngine, on_step: OnStep) -> None:
    handles = planned.facade.handles
    for index, handle in enumerate(handles):

        def progress(fraction: float, done: int = index) -> None:
            on_step(StepReport(3, STEPS[2], fraction=(done + fraction) / len(handles)))

        handle.materialize(progress)


def _allocate(
    planned: PlannedEngine, model: torch.nn.Module, ranks: Ranks | None
) -> tuple[ModelRunner, TargetStateStore, list[dict[str, KVCache]]]:
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


def _assemble(
    planned: PlannedEngine,
    runner: ModelRunner,
    states: TargetStateStore,
    caches: list[dict[str, KVCache]],
    tokenizer: Callable[[], Any],
    ends: frozenset[int],
) -> Engine:
    config, plan, architecture = planned.config, planned.plan, planned.architecture
    randomness = EngineRandomness(config.seed, planned.device)
    workspace = Workspace(planned.num_entries, architecture.vocab_size, planned.device)
    planned.registry.register_verifier(LosslessVerifier(randomness, config.chain_verification, workspace))
    is_auto = any(speculator.config.is_auto for speculator in planned.speculators)
    policy: DraftLengthPolicy = AdaptiveDraftLength(planned.speculators) if is_auto else FixedDraftLength()
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
    chain.warmup(_resources(planned, states, caches))
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
    planned: PlannedEngine, states: TargetStateStore, caches: Sequence[dict[str, KVCache]]
) -> list[Resources]:
    """What each speculator's `warmup` is given."""
    config = planned.config
    compiles = wants_compilation(config.compile, planned.architecture.weight_bytes)
    return [
        Resources(
            device=planned.device,
            block_size=planned.plan.block_size,
            num_blocks=planned.plan.num_blocks,
            kv_caches=own,
            row_buckets=row_buckets(config.max_num_seqs),
            hidden_states={b: states.delivery[b] for b in speculator.traits.hidden_states},
            compile=compile_step if compiles else no_compile,
            compile_loop=partial(compile_loop, most_rows=config.max_num_seqs) if compiles else plain_loop,
        )
        for speculator, own in zip(planned.speculators, caches, strict=True)
    ]


def _tokenizer_folder(planned: PlannedEngine) -> Path:
    config = planned.config
    if config.tokenizer is None:
        return planned.folder
    return resolve_checkpoint(resolve_model(config.tokenizer), trust_remote_code=config.trust_remote_code)
