"""Starting an engine in six steps. Each is timed and reported; when one fails, what the earlier ones did is undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug.configuration.engine import EngineConfig
from specplug.contract.memory import MemoryBudget, MemoryRegion
from specplug.contract.resources import Resources
from specplug.contract.settings import SpeculativeConfig
from specplug.engine.engine import Engine
from specplug.engine.intake import Intake
from specplug.engine.scheduler import Scheduler
from specplug.errors import CheckpointError, ConfigurationError, PluginError, SpecplugError, StartupError
from specplug.memory.available import default_budget
from specplug.memory.plan import MemoryPlan, solve
from specplug.model.architecture import Architecture, inspect_architecture
from specplug.model.checkpoint import choose_dtype, load_config, read_headers, resolve_checkpoint
from specplug.model.kv_cache import KVCache
from specplug.model.loading import load_model
from specplug.model.probe import check_parity
from specplug.model.runner import ModelRunner
from specplug.plugins.registry import PluginRegistry, RegisteredSpeculator
from specplug.sampling.randomness import EngineRandomness
from specplug.sampling.workspace import Workspace
from specplug.speculation.chain import SpeculatorChain
from specplug.speculation.policy import FixedBudget
from specplug.speculation.states import ChannelSpec, StateStore, channels_for
from specplug.speculation.target import LazyModel, TargetFacade
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


@attrs.frozen
class StepReport:
    """One startup step, begun or done.

    Attributes:
        number: 1 to 6.
        name: of the step.
        seconds: how long it took; None while it runs.
        fraction: how much of it is done, between 0 and 1.
    """

    number: int
    name: str
    seconds: float | None = None
    fraction: float = 0.0


OnStep = Callable[[StepReport], None]


@attrs.define(eq=False)
class PlannedEngine:
    """Everything known before weights are read: what `specplug plan` shows and the engine is then built from."""

    config: EngineConfig
    folder: Path
    model_config: Any
    architecture: Architecture
    dtype: torch.dtype
    device: torch.device
    registry: PluginRegistry
    speculators: list[RegisteredSpeculator]
    regions: list[list[MemoryRegion]]
    channels: dict[Any, ChannelSpec]
    facade: TargetFacade
    plan: MemoryPlan
    num_entries: int


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
    with ExitStack() as undo:
        with _step(1, on_step):
            planned = plan_engine(config, tokenizer=tokenizer)
            undo.callback(planned.facade.close)
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
                check_parity(runner, planned.model_config, config.block_size)
            engine = _assemble(planned, runner, states, caches, tokenizer)
        with _step(6, on_step):
            undo.pop_all()
        return engine


@contextmanager
def _step(number: int, on_step: OnStep) -> Iterator[None]:
    name = STEPS[number - 1]
    on_step(StepReport(number, name))
    started = time.perf_counter()
    try:
        yield
    except SpecplugError as error:
        error.add_note(f"startup step {number} of {len(STEPS)}: {name}")
        raise
    except Exception as error:
        raise StartupError(f"startup step {number} of 6 ({name}) failed: {type(error).__name__}: {error}") from error
    on_step(StepReport(number, name, time.perf_counter() - started, 1.0))


def plan_engine(config: EngineConfig, *, tokenizer: Callable[[], Any] = lambda: None) -> PlannedEngine:
    """Step 1: everything that can be known and refused from configuration and headers alone."""
    registry = PluginRegistry(config.allowed_plugins, config.denied_plugins, config.plugins)
    folder = resolve_checkpoint(resolve_model(config.model), config.revision)
    model_config = load_config(folder, trust_remote_code=config.trust_remote_code)
    read_headers(folder)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, model_config)
    architecture = inspect_architecture(model_config, dtype, trust_remote_code=config.trust_remote_code)
    if config.max_model_len is not None and config.max_model_len > architecture.context_length:
        raise ConfigurationError(
            f"max_model_len={config.max_model_len:,} is more than the {architecture.context_length:,} positions that "
            f"{architecture.name} can be given in a batch; lower it"
        )
    longest = config.max_model_len or architecture.context_length
    facade = TargetFacade(
        config=model_config,
        source=config.model,
        revision=config.revision,
        dtype=dtype,
        device=device,
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        num_layers=len(architecture.layers),
        max_model_len=longest,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        tokenizer=tokenizer,
    )
    speculators = [registry.load_speculator(speculative, facade) for speculative in _chain(config.speculative)]
    channels = channels_for([s.traits for s in speculators], architecture.hidden_size, dtype)
    _check_boundaries(speculators, len(architecture.layers))
    budget = MemoryBudget(
        total_bytes=config.memory or default_budget(device),
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=longest,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_speculative_tokens=max([_max_nodes(s) for s in speculators], default=0),
        dtype=dtype,
    )
    regions = [_plan_regions(speculator, budget) for speculator in speculators]
    num_entries = min(config.max_num_batched_tokens, config.max_num_seqs * (1 + budget.num_speculative_tokens))
    plan = solve(
        budget,
        target_weights=architecture.weight_bytes,
        target_kv_bytes_per_token=sum(layer.elements for layer in architecture.kv_layers) * dtype.itemsize,
        regions=[region for own in regions for region in own],
        buffers=StateStore.planned_bytes(channels, config.max_num_seqs, config.max_num_batched_tokens)
        + Workspace.planned_bytes(num_entries, architecture.vocab_size),
        context_length=architecture.context_length,
        wanted_model_len=config.max_model_len,
    )
    return PlannedEngine(
        config=config,
        folder=folder,
        model_config=model_config,
        architecture=architecture,
        dtype=dtype,
        device=device,
        registry=registry,
        speculators=speculators,
        regions=regions,
        channels=channels,
        facade=facade,
        plan=plan,
        num_entries=num_entries,
    )


def choose_device(name: str) -> torch.device:
    """Resolves `auto` or a device's name.

    Raises:
        ConfigurationError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device='{name}' is not a device's name; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device='{name}': this machine (or this build of torch) has no CUDA device; use cpu")
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device='{name}' is not supported; use auto, cpu, cuda or cuda:N")
    return device


def _chain(speculative: SpeculativeConfig | None) -> Iterator[SpeculativeConfig]:
    while speculative is not None:
        yield speculative
        speculative = speculative.fallback


def _max_nodes(speculator: RegisteredSpeculator) -> int:
    return speculator.traits.max_nodes or speculator.config.num_speculative_tokens


def _check_boundaries(speculators: Sequence[RegisteredSpeculator], num_layers: int) -> None:
    for speculator in speculators:
        for boundary in speculator.traits.hidden_states:
            if boundary != "final" and not 0 <= boundary <= num_layers:
                raise PluginError(
                    f"speculator '{speculator.method}' asks for hidden states at boundary {boundary}; the target has "
                    f"boundaries 0 to {num_layers}, and 'final'"
                )


def _plan_regions(speculator: RegisteredSpeculator, budget: MemoryBudget) -> list[MemoryRegion]:
    regions = speculator.plan_memory(budget=budget) or []
    for region in regions:
        if not isinstance(region, MemoryRegion):
            raise PluginError(
                f"speculator '{speculator.method}': plan_memory returned {region!r}, expected MemoryRegions"
            )
        if region.layers and region.dtype is None:
            raise PluginError(f"speculator '{speculator.method}': the KV region '{region.name}' names no dtype")
    if len({region.name for region in regions}) < len(regions):
        raise PluginError(f"speculator '{speculator.method}': two memory regions have the same name")
    speculator.scratch_tokens_per_row = max((region.scratch_tokens_per_row for region in regions), default=0)
    return list(regions)


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
    states = StateStore(planned.channels, planned.config.max_num_seqs, planned.config.max_num_batched_tokens, device)
    caches = [
        {
            region.name: KVCache(region.layers, plan.num_blocks, plan.block_size, region.dtype or planned.dtype, device)
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
) -> Engine:
    config, plan = planned.config, planned.plan
    randomness = EngineRandomness(config.seed, planned.device)
    workspace = Workspace(planned.num_entries, planned.architecture.vocab_size, planned.device)
    planned.registry.register_verifier(LosslessVerifier(randomness, config.chain_verification, workspace))
    chain = SpeculatorChain(
        planned.speculators,
        states,
        FixedBudget(),
        vocab_size=planned.architecture.vocab_size,
        max_model_len=plan.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
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
            )
            for speculator, own in zip(planned.speculators, caches, strict=True)
        ]
    )
    lookahead = max((max(s.scratch_tokens_per_row, _max_nodes(s)) for s in planned.speculators), default=0)
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
            eos_ids(planned.folder, planned.model_config),
            randomness,
            tokenizer,
            planned.device,
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


def _row_buckets(max_num_seqs: int) -> tuple[int, ...]:
    buckets = [1]
    while buckets[-1] < max_num_seqs:
        buckets.append(min(buckets[-1] * 2, max_num_seqs))
    return tuple(buckets)


def eos_ids(folder: Path, model_config: Any) -> frozenset[int]:
    """The ids that end a sequence: those of generation_config.json if it names any, else of config.json."""
    from transformers import GenerationConfig

    ids: Any = None
    if (folder / "generation_config.json").is_file():
        try:
            ids = GenerationConfig.from_pretrained(folder).eos_token_id
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / 'generation_config.json'} is damaged: {error}") from error
    if ids is None:
        ids = getattr(model_config.get_text_config(), "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
