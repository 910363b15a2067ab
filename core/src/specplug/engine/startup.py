"""Starting an engine in six steps. Each is timed and reported; when one fails, what the earlier ones did is undone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug import native, threads
from specplug.config.engine import EngineConfig
from specplug.contract.resources import Resources
from specplug.engine.compilation import compile_forwards, wants_compilation
from specplug.engine.engine import Engine
from specplug.engine.intake import Intake
from specplug.engine.planning import PlannedEngine, max_nodes_of, plan_engine, wants_top_k_at_drafts
from specplug.engine.scheduler import Scheduler
from specplug.errors import SpecplugError, StartupError
from specplug.model.checkpoint import resolve_checkpoint
from specplug.model.compiled_step import compile_step
from specplug.model.kv_cache import KVCache
from specplug.model.loading import load_model
from specplug.model.probe import check_parity
from specplug.model.runner import ModelRunner
from specplug.model.tokenizer import check_tokenizer
from specplug.model.torch_state import own_torch_state
from specplug.plugins.registry import RegisteredSpeculator
from specplug.plugins.target import LazyModel
from specplug.sampling.defaults import eos_ids
from specplug.sampling.randomness import EngineRandomness
from specplug.sampling.workspace import Workspace
from specplug.speculation.auto import AutoBudget
from specplug.speculation.chain import SpeculatorChain
from specplug.speculation.policy import BudgetPolicy, FixedBudget
from specplug.speculation.states import StateStore
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
    """One startup step, begun or done.

    Attributes:
        number: 1 to 6; 0 before the first step, where the native kernels are compiled, once.
        name: of the step.
        seconds: how long it took; None while it runs.
        fraction: how much of it is done, between 0 and 1.
        elapsed: seconds that it has run for, where no fraction is known.
    """

    number: int
    name: str
    seconds: float | None = None
    fraction: float = 0.0
    elapsed: float = 0.0


OnStep = Callable[[StepReport], None]
_starting = threading.RLock()
"""One start at a time: loading and compiling change what belongs to the whole process, such as PyTorch's default dtype."""


def start_engine(
    config: EngineConfig, *, tokenizer: Callable[[], Any] = lambda: None, on_step: OnStep = lambda report: None
) -> Engine:
    """Starts an engine.

    Args:
        config: what to run and how.
        tokenizer: gives the target's tokenizer to speculators that ask for it.
        on_step: told of every step's begin, progress and end.

    Raises:
        SpecplugError: with the failed step, the cause, and what to change.
    """
    with own_torch_state(), _starting, ExitStack() as undo:
        with _step(1, on_step) as clock:
            planned = plan_engine(config, tokenizer=tokenizer, before_kernels=lambda: _compile_kernels(on_step, clock))
            undo.callback(planned.facade.close)
            if not config.skip_tokenizer_init:
                check_tokenizer(_tokenizer_folder(planned))
            if planned.device.type == "cpu":
                threads.warn_of_too_many()
            ends = eos_ids(planned.folder, planned.model_config, planned.architecture.vocab_size)
        with _step(2, on_step):
            model = load_model(
                planned.folder,
                planned.model_config,
                planned.dtype,
                planned.device,
                trust_remote_code=config.trust_remote_code,
            )
            planned.facade.attach(model)
        with _step(3, on_step):
            _load_drafts(planned, on_step)
        with _step(4, on_step):
            runner, states, caches = _allocate(planned, model)
            undo.callback(runner.close)
        with _step(5, on_step):
            if config.check_parity:
                check_parity(
                    runner, planned.model_config, config.block_size, trust_remote_code=config.trust_remote_code
                )
            if wants_compilation(config.compile, planned.architecture.weight_bytes):
                drafts = [h.runner for h in planned.facade.handles if isinstance(h, LazyModel) and h.runner]
                compile_forwards([runner, *drafts], config.block_size, planned.most_captured)
            engine = _assemble(planned, runner, states, caches, tokenizer, ends)
        with _step(6, on_step):
            undo.pop_all()
        return engine


@attrs.define
class _Clock:
    """Of a step: seconds in it that are another's."""

    left_out: float = 0.0


def _compile_kernels(on_step: OnStep, clock: _Clock) -> None:
    """Compiles the native kernels if need be, which is reported as a step of its own within the first."""
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


def _load_drafts(planned: PlannedEngine, on_step: OnStep) -> None:
    handles = planned.facade.handles
    for index, handle in enumerate(handles):

        def progress(fraction: float, done: int = index) -> None:
            on_step(StepReport(3, STEPS[2], fraction=(done + fraction) / len(handles)))

        handle.materialize(progress)


def _allocate(
    planned: PlannedEngine, model: torch.nn.Module
) -> tuple[ModelRunner, StateStore, list[dict[str, KVCache]]]:
    plan, device = planned.plan, planned.device
    cache = KVCache(planned.architecture.kv_layers, plan.num_blocks, plan.block_size, planned.dtype, device)
    boundaries = [b for speculator in planned.speculators for b in speculator.traits.hidden_states]
    runner = ModelRunner(model, planned.architecture, cache, device, boundaries)
    states = StateStore(
        planned.channels,
        planned.config.max_num_seqs,
        planned.config.max_num_batched_tokens,
        device,
        at_drafts=wants_top_k_at_drafts(planned.speculators),
    )
    caches = [
        {
            region.name: KVCache(
                region.layers,
                plan.num_blocks,
                plan.block_size,
                region.dtype or planned.dtype,
                region.device or device,
            )
            for region in regions
            if region.layers
        }
        for regions in planned.regions
    ]
    for handle in planned.facade.handles:
        for own in caches:
            if isinstance(handle, LazyModel):
                handle.bind(own)
    return runner, states, caches


def _assemble(
    planned: PlannedEngine,
    runner: ModelRunner,
    states: StateStore,
    caches: list[dict[str, KVCache]],
    tokenizer: Callable[[], Any],
    ends: frozenset[int],
) -> Engine:
    config, plan = planned.config, planned.plan
    compiles = wants_compilation(config.compile, planned.architecture.weight_bytes)
    randomness = EngineRandomness(config.seed, planned.device)
    workspace = Workspace(planned.num_entries, planned.architecture.vocab_size, planned.device)
    planned.registry.register_verifier(LosslessVerifier(randomness, config.chain_verification, workspace))
    chain = SpeculatorChain(
        planned.speculators,
        states,
        choose_policy(planned.speculators),
        vocab_size=planned.architecture.vocab_size,
        max_model_len=plan.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_draft_tokens=config.max_num_draft_tokens,
        strict=config.strict,
    )
    chain.warmup(
        [
            Resources(
                device=planned.device,
                block_size=plan.block_size,
                num_blocks=plan.num_blocks,
                kv_caches=own,
                row_buckets=_row_buckets(config.max_num_seqs),
                hidden_states={b: states.delivery[b] for b in speculator.traits.hidden_states},
                **({"compile": compile_step} if compiles else {}),
            )
            for speculator, own in zip(planned.speculators, caches, strict=True)
        ]
    )
    lookahead = max((max(s.scratch_tokens_per_row, max_nodes_of(s)) for s in planned.speculators), default=0)
    shared = [runner.cache]
    for regions, own in zip(planned.regions, caches, strict=True):
        shared += [own[region.name] for region in regions if region.layers and region.tables == "shared"]
    return Engine(
        config=config,
        plan=plan,
        runner=runner,
        shared_caches=shared,
        registry=planned.registry,
        chain=chain,
        states=states,
        intake=Intake(
            plan,
            planned.architecture.vocab_size,
            ends,
            randomness,
            tokenizer,
            planned.device,
            planned.architecture.context_note,
        ),
        workspace=workspace,
        scheduler=Scheduler(
            plan.num_blocks,
            plan.block_size,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            lookahead,
            plan.max_model_len,
        ),
        closers=[planned.facade.close, runner.close],
    )


def _tokenizer_folder(planned: PlannedEngine) -> Path:
    config = planned.config
    if config.tokenizer is None:
        return planned.folder
    return resolve_checkpoint(resolve_model(config.tokenizer), trust_remote_code=config.trust_remote_code)


def choose_policy(speculators: Sequence[RegisteredSpeculator]) -> BudgetPolicy:
    """Budgets as configured; as measured where any speculator's are to be chosen."""
    if any(speculator.config.is_auto for speculator in speculators):
        return AutoBudget(speculators)
    return FixedBudget()


def _row_buckets(max_num_seqs: int) -> tuple[int, ...]:
    buckets = [1]
    while buckets[-1] < max_num_seqs:
        buckets.append(min(buckets[-1] * 2, max_num_seqs))
    return tuple(buckets)
