"""Plans an engine from configuration and headers, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug.config.engine import EngineConfig
from specplug.contract.resources import MemoryBudget, MemoryRegion
from specplug.engine.memory_plan import MemoryPlan, default_budget, solve
from specplug.errors import CheckpointError, ConfigurationError, PluginError
from specplug.host.loading import check_traits, load_speculators, max_nodes_of, plan_regions, wants_top_k_at_drafts
from specplug.lora.room import AdapterRoom, plan_room
from specplug.model.architecture.architecture import Architecture
from specplug.model.architecture.inspection import inspect_architecture
from specplug.model.architecture.refusal import check_kind
from specplug.model.compile.cuda_graphs import HELD_TOKENS, MOST_CAPTURED, MOST_TOKENS
from specplug.model.compile.memory import StepModel, step_bytes
from specplug.model.compile.runners import wants_compilation
from specplug.model.device import choose_device
from specplug.model.load.checkpoint import choose_dtype, load_config, read_headers, resolve_checkpoint
from specplug.model.load.gguf_header import is_gguf
from specplug.model.load.quantised import is_quantised
from specplug.model.load.tokenizer import load_tokenizer
from specplug.model.load.weights import count_weights
from specplug.model.parallel.plan import check_ranks
from specplug.model.recurrent.layers import bytes_per_row
from specplug.plugins.lazy_model import LazyModel
from specplug.plugins.registry import PluginRegistry, RegisteredSpeculator
from specplug.plugins.target import TargetFacade
from specplug.sampling.workspace import Workspace
from specplug.speculation.target_states.ring_buffer import ChannelSpec
from specplug.speculation.target_states.store import TargetStateStore, channels_for
from specplug.tiny import resolve_model

_GPU_TOKENS = ((32 << 30, 8192), (8 << 30, 2048), (0, 1024))
"""Bytes of memory, and the most tokens of a step from there on. H200, 6.9B: 16,384 prompt tokens took 0.37 s in steps of
8,192; a step of 1,024 cannot use the card's matmul rate."""


@attrs.define(eq=False)
class PlannedEngine:
    """The plan of an engine: `specplug plan` shows it, and the engine is built from it."""

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
    num_held: int
    most_captured: int
    max_num_batched_tokens: int
    adapters: AdapterRoom | None = None

    @property
    def caches_prefixes(self) -> bool:
        """Whether rows look for the KV of their first tokens: not where a recurrent state would have to be stored with it."""
        return self.config.enable_prefix_caching and not self.architecture.state_calls


@attrs.frozen(eq=False)
class _Target:
    """What configuration and headers say about the target."""

    folder: Path
    config: Any
    architecture: Architecture
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    total_bytes: int
    max_num_batched_tokens: int


def plan_engine(
    config: EngineConfig,
    *,
    tokenizer: Callable[[], Any] = lambda: None,
    before_kernels: Callable[[], None] = lambda: None,
) -> PlannedEngine:
    """Startup step 1: plans the engine, and refuses what cannot work, from configuration and headers alone.

    Args:
        config: the engine's.
        tokenizer: gives the target's tokenizer to speculators that request it.
        before_kernels: called on a CPU, after the target is inspected and before it is known which kernels are available.
    """
    registry = PluginRegistry(config.allowed_plugins, config.denied_plugins, config.plugins, strict=config.strict)
    registry.check(config.speculative)
    target = _inspect_target(config)
    if target.device.type == "cpu":
        before_kernels()
    architecture, dtype, device = target.architecture, target.dtype, target.device
    adapters = _adapter_room(config, target)
    facade = _target_facade(config, target, tokenizer)
    speculators = load_speculators(registry, config.speculative, facade)
    for speculator in speculators:
        check_traits(speculator, len(architecture.layers), architecture.vocab_size)
        _check_stream(speculator, architecture)
    channels = channels_for([s.traits for s in speculators], architecture.hidden_size, dtype)
    batched_tokens = target.max_num_batched_tokens
    budget = MemoryBudget(
        total_bytes=target.total_bytes,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=target.max_model_len,
        max_num_batched_tokens=batched_tokens,
        num_speculative_tokens=max([max_nodes_of(s) for s in speculators], default=0),
        dtype=dtype,
        compiled_output_tokens=HELD_TOKENS if device.type == "cuda" else 0,
        loop_rows=min(MOST_CAPTURED, config.max_num_seqs) if device.type == "cuda" else 0,
    )
    regions = [plan_regions(speculator, budget) for speculator in speculators]
    num_entries = min(batched_tokens, config.max_num_seqs * (1 + budget.num_speculative_tokens))
    most_captured = min(MOST_TOKENS, batched_tokens)
    buffers = TargetStateStore.planned_bytes(
        channels, config.max_num_seqs, batched_tokens, at_drafts=wants_top_k_at_drafts(speculators)
    )
    buffers += Workspace.planned_bytes(num_entries, architecture.vocab_size)
    temporary = 0
    if device.type == "cuda":
        boundaries = {b for speculator in speculators for b in speculator.traits.hidden_states}
        temporary = step_bytes(
            StepModel(
                target.config, architecture.kv_layers, architecture.vocab_size, dtype, num_states=len(boundaries)
            ),
            _drafts(facade, regions, device),
            device,
            tokens=batched_tokens,
            entries=num_entries,
            captured=most_captured,
            is_captured=not (architecture.state_calls or architecture.reads_values)
            and wants_compilation(config.compile, architecture.weight_bytes),
        )
    held = 1 + budget.num_speculative_tokens
    plan = solve(
        budget,
        target_weights=facade.weight_bytes,
        target_kv_bytes_per_token=sum(layer.elements for layer in architecture.kv_layers) * dtype.itemsize,
        regions=[(s.method, region) for s, own in zip(speculators, regions, strict=True) for region in own],
        buffers=buffers,
        context_length=architecture.context_length,
        wanted_model_len=config.max_model_len,
        device=device,
        step_bytes=temporary,
        state_bytes_per_row=bytes_per_row(architecture.state_calls, held, dtype),
        adapters=0 if adapters is None else adapters.num_bytes,
        loading_bytes=max([architecture.loading_bytes, *(model.loading_bytes for model in _models_on(facade, device))]),
    )
    return PlannedEngine(
        config=attrs.evolve(config, max_num_batched_tokens=batched_tokens),
        folder=target.folder,
        model_config=target.config,
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
        num_held=held,
        most_captured=most_captured,
        max_num_batched_tokens=batched_tokens,
        adapters=adapters,
    )


def _inspect_target(config: EngineConfig) -> _Target:
    folder = resolve_checkpoint(
        resolve_model(config.model), config.revision, trust_remote_code=config.trust_remote_code
    )
    model_config = load_config(folder, trust_remote_code=config.trust_remote_code)
    check_kind(model_config, trust_remote_code=config.trust_remote_code)
    headers = read_headers(folder)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, model_config)
    check_ranks(config.tensor_parallel_size, device, is_quantised=is_quantised(model_config) or is_gguf(folder))
    architecture = inspect_architecture(model_config, dtype, trust_remote_code=config.trust_remote_code)
    architecture = count_weights(folder, headers, model_config, architecture, dtype, device)
    if config.quantization is not None:
        _check_quantization(config, device, is_quantised=is_quantised(model_config))
        architecture = architecture.in_int8(dtype)
    architecture = architecture.of_rank(config.tensor_parallel_size)
    if config.max_model_len is not None and config.max_model_len > architecture.context_length:
        note = f" ({architecture.context_note})" if architecture.context_note else ""
        raise ConfigurationError(
            f"max_model_len={config.max_model_len:,} is more than the {architecture.context_length:,} positions that "
            f"{architecture.name} can be given in a batch{note}; lower it"
        )
    longest = config.max_model_len or architecture.context_length
    total = config.memory or default_budget(device, config.tensor_parallel_size)
    batched_tokens = config.max_num_batched_tokens or max(_batched_tokens(device, total), config.max_num_seqs)
    return _Target(folder, model_config, architecture, dtype, device, longest, total, batched_tokens)


def _batched_tokens(device: torch.device, total_bytes: int) -> int:
    """The most tokens of a step where the user does not say: enough to keep the device's matmuls busy with prompts."""
    if device.type == "cpu":
        return 1024
    return next(tokens for least, tokens in _GPU_TOKENS if total_bytes >= least)


def _check_quantization(config: EngineConfig, device: torch.device, *, is_quantised: bool) -> None:
    given = f"quantization='{config.quantization}'"
    if device.type != "cpu":
        raise ConfigurationError(
            f"{given} is for CPUs, and the device is {device}; give device='cpu', or a checkpoint that is quantised"
        )
    if is_quantised:
        raise ConfigurationError(
            f"{given}: the weights of {config.model} are quantised already; leave quantization out"
        )
    if config.tensor_parallel_size > 1:
        raise ConfigurationError(f"{given} runs in one process; leave it out, or give tensor_parallel_size=1")


def _target_facade(config: EngineConfig, target: _Target, tokenizer: Callable[[], Any]) -> TargetFacade:
    architecture = target.architecture
    return TargetFacade(
        config=target.config,
        source=config.model,
        revision=config.revision,
        dtype=target.dtype,
        device=target.device,
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        num_layers=len(architecture.layers),
        weight_bytes=architecture.loaded_bytes(target.dtype, target.device),
        max_model_len=target.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=target.max_num_batched_tokens,
        tokenizer=lambda: _target_tokenizer(tokenizer, target.folder, config.trust_remote_code),
    )


def _adapter_room(config: EngineConfig, target: _Target) -> AdapterRoom | None:
    if not config.has_lora:
        return None
    architecture, modules = target.architecture, config.lora_modules
    return plan_room(
        modules, config.max_loras, config.max_lora_rank, architecture.linears, architecture.name, target.dtype
    )


def _drafts(facade: TargetFacade, regions: Sequence[Sequence[MemoryRegion]], device: torch.device) -> list[StepModel]:
    """The speculators' models that run on the target's device."""
    planned = {region.name for own in regions for region in own if region.layers}
    models = _models_on(facade, device)
    caches = [(model, region) for model in models for region in model.regions() if region.name in planned]
    return [StepModel(model.config, region.layers, model.vocab_size, model.dtype) for model, region in caches]


def _models_on(facade: TargetFacade, device: torch.device) -> list[LazyModel]:
    return [handle for handle in facade.handles if isinstance(handle, LazyModel) and handle.device == device]


def _target_tokenizer(tokenizer: Callable[[], Any], folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer that speculators see: the engine's, else the checkpoint's; None if there is none."""
    try:
        own = tokenizer()
        return load_tokenizer(folder, trust_remote_code=trust_remote_code) if own is None else own
    except CheckpointError:
        return None


def _check_stream(speculator: RegisteredSpeculator, architecture: Architecture) -> None:
    """Refuses states between layers that carry several states per token.

    Raises:
        PluginError: the speculator declares such a boundary.
    """
    for boundary in speculator.traits.hidden_states:
        if boundary != "final" and not architecture.has_plain_stream:
            raise PluginError(
                f"speculator '{speculator.method}' declares traits.hidden_states with boundary {boundary}, but the layers of "
                f"{architecture.name} carry more than one state per token; only 'final' can be delivered for it"
            )
