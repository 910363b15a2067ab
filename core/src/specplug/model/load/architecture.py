"""A model's layers, KV shapes and sizes, found by running it once on the meta device: no weights, no config formulas.

The traced call of every attention layer says what the KV cache must store (multi-head latent attention, for example,
shows its expanded keys and values here) and whether the model can run as a packed batch.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import attrs
import torch
from torch.overrides import TorchFunctionMode

from specplug.contract.resources import KVLayer
from specplug.errors import UnsupportedModelError
from specplug.model.attention.interface import SITE
from specplug.model.linears import LinearLayer, LinearUses
from specplug.model.load import masks
from specplug.model.load.library_output import quiet_transformers
from specplug.model.load.masks import Mask
from specplug.model.load.max_length import LENGTH_DEPENDENT_ROPE, context_length, context_note, rope_parameters
from specplug.model.load.packing import can_pack
from specplug.model.load.refusal import (
    build_failure,
    check_attention,
    check_causality,
    check_kind,
    check_positions,
    forward_failure,
)
from specplug.model.load.wrappers import drop_towers, find_towers, make_model
from specplug.model.parallel.plan import ShardPlan, shard_plan, wildcards
from specplug.model.recurrent.layers import StateCall
from specplug.model.recurrent.tracing import KNOWN_TYPES, check_layers, check_once, check_states, record_states

_LAYER_NAME = re.compile(r"^(.*?\.\d+)\.")
_TRACE_TOKENS = 6


@attrs.frozen
class AttentionCall:
    """One attention layer in the trace.

    Attributes:
        module: its name in the model.
        kv: what it stores per token.
        mask: its mask.
        num_heads: its query heads.
    """

    module: str
    kv: KVLayer
    mask: Mask = attrs.field(factory=Mask)
    num_heads: int = 0


@attrs.frozen
class Architecture:
    """The facts about a model that planning and running need.

    Attributes:
        name: the model class.
        calls: the attention layers, in the order they run.
        layers: the names of the decoder layers; boundary b of the residual stream enters layer b.
        vocab_size: the width of the logits.
        hidden_size: the width of the residual stream.
        weight_bytes: parameters and buffers in the dtype they are loaded in, shared ones once.
        context_length: the longest sequence that positions exist for.
        has_plain_stream: whether every layer gives the residual stream as one state per token; some carry several.
        tied_head_bytes: of an output layer that shares the embedding's table; 0 if it has its own.
        context_note: why `context_length` is shorter than the configuration says; empty if it is not.
        tensor_kinds: the last parts of its tensors' names, such as `weight`.
        buffer_bytes: of the buffers that no checkpoint stores, in `weight_bytes`.
        towers: the modules that text never reaches (images, sound); they are not loaded.
        state_calls: the calls that carry recurrent state from token to token, in the order they run.
        shards: how it is split over ranks.
        linears: the linear layers that an adapter can be added to.
    """

    name: str
    calls: tuple[AttentionCall, ...]
    layers: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    weight_bytes: int
    context_length: int
    has_plain_stream: bool = True
    tied_head_bytes: int = 0
    context_note: str = ""
    tensor_kinds: frozenset[str] = frozenset()
    buffer_bytes: int = 0
    towers: tuple[str, ...] = ()
    state_calls: tuple[StateCall, ...] = ()
    shards: ShardPlan = attrs.field(factory=ShardPlan)

    def of_rank(self, size: int) -> Architecture:
        """What one of `size` ranks holds of it.

        Where a layer's heads cannot be split evenly, every rank holds all of its attention.

        Raises:
            UnsupportedModelError: Transformers cannot split it.
        """
        if size == 1:
            return self
        if self.state_calls:
            raise UnsupportedModelError(
                f"tensor_parallel_size={size}: {self.name} keeps recurrent state, which cannot be split yet; use 1"
            )
        shards = self.shards.whole(*self._unsplittable(size))
        if not shards.split_bytes:
            raise UnsupportedModelError(
                f"tensor_parallel_size={size}: Transformers has no tensor parallel plan for {self.name}; use 1"
            )
        own = shards.kv_layers(self.kv_layers, size)
        return attrs.evolve(
            self,
            calls=tuple(attrs.evolve(call, kv=kv) for call, kv in zip(self.calls, own, strict=True)),
            weight_bytes=shards.weight_bytes(self.weight_bytes, size),
            shards=shards,
        )

    linears: tuple[LinearLayer, ...] = ()

    def loaded_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes of the weights as they are held: a packed output layer is a second copy of a tied table."""
        return self.weight_bytes + (self.tied_head_bytes if can_pack(dtype, device) else 0)

    def _unsplittable(self, size: int) -> set[str]:
        """Attention modules, or their keys and values, of which every one of `size` ranks needs all."""
        found = set()
        for call in self.calls:
            name, heads, kv_heads = wildcards(call.module), call.num_heads, call.kv.num_heads
            if heads % size or (kv_heads % size and kv_heads > 1):
                found.add(name)
            elif kv_heads == 1:
                found |= {f"{name}.k_proj", f"{name}.v_proj"}
        return found

    @property
    def kv_layers(self) -> tuple[KVLayer, ...]:
        """What the KV cache stores per token, layer by layer."""
        return tuple(call.kv for call in self.calls)


class _Recorder:
    """Takes the place of an attention site during the trace."""

    def __init__(self, name: str, module: torch.nn.Module, trace: _Trace) -> None:
        self._name = name
        self._module = module
        self._trace = trace

    def record(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        layer = KVLayer(key.shape[1], key.shape[3], value.shape[3])
        self._trace.calls.append(AttentionCall(self._name, layer, masks.read_mask(attention_mask), query.shape[1]))
        self._trace.modules.append(self._module)
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _recording_interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    return module.__dict__[SITE].record(query, key, value, attention_mask), None


class _Use(TorchFunctionMode):
    """Records the `id` of the tensors that something is computed from, and that of the modules that run."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.used: set[int] = set()
        self._hooks = [module.register_forward_pre_hook(self._ran) for module in model.modules()]

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        for hook in self._hooks:
            hook.remove()

    def _ran(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.used.add(id(module))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # reading an attribute, such as a dtype
            self.used.update(id(each) for each in (*args, *(kwargs or {}).values()) if isinstance(each, torch.Tensor))
        if func is torch.all and args[0].is_meta:  # asked of the attention mask, which is one of ones
            return torch.tensor(True, dtype=torch.bool, device="cpu")
        return func(*args, **(kwargs or {}))


@attrs.define
class _Trace:
    """What one forward on the meta device recorded.

    Attributes:
        calls: of the attention interface.
        modules: the modules that made them.
        states: calls of functions that carry recurrent state.
        vocab_size: the width of the logits.
        used: `id` of the modules that ran and the tensors that something was computed from.
        uses_positions: whether `position_ids` are among these.
    """

    calls: list[AttentionCall] = attrs.field(factory=list)
    modules: list[torch.nn.Module] = attrs.field(factory=list)
    states: list[StateCall] = attrs.field(factory=list)
    vocab_size: int = 0
    used: set[int] = attrs.field(factory=set)
    uses_positions: bool = False

    @property
    def busy_layers(self) -> tuple[str, ...]:
        """The decoder layers that attend or carry state."""
        modules = (*(call.module for call in self.calls), *(call.module for call in self.states))
        return tuple(dict.fromkeys(match.group(1) for name in modules if (match := _LAYER_NAME.match(name))))


class _Streams:
    """Output shapes of numbered modules, among them the decoder layers, during the trace."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, module in model.named_modules():
            if _LAYER_NAME.fullmatch(f"{name}."):
                module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = output if isinstance(output, torch.Tensor) else output[0]
            self._shapes[name] = tuple(given.shape) if isinstance(given, torch.Tensor) else ()

        return hook

    def are_plain(self, layers: tuple[str, ...], hidden_size: int) -> bool:
        """Whether these layers give one state per token."""
        return all(self._shapes.get(layer) == (1, _TRACE_TOKENS, hidden_size) for layer in layers)


def inspect_architecture(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Architecture:
    """Traces a model from its configuration alone.

    Raises:
        UnsupportedModelError: the model does not run every layer's attention through Transformers' attention interface,
            keeps recurrent state, or needs positions that a packed batch cannot give.
    """
    masks.register(_recording_interface)
    config = copy.deepcopy(config)
    model_type = getattr(config, "model_type", "unknown")
    check_kind(config, trust_remote_code=trust_remote_code)
    _check_layer_types(config, model_type)
    longest, note = context_length(config), context_note(config)
    for parameters in rope_parameters(config):
        if parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE:  # reads positions: not possible on the meta device
            parameters["rope_type"] = "default"
    try:
        with torch.device("meta"), quiet_transformers():
            model = make_model(config, dtype, masks.RECORDING, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise build_failure(model_type, error) from error
    sizes, tied_head_bytes = _sizes(model), _tied_head_bytes(model)
    streams, linears = _Streams(model), LinearUses(model, _TRACE_TOKENS)
    trace = _run(model, model_type, dtype)
    layers = _decoder_layers(model, trace)
    towers = find_towers(model, layers, trace.used) if type(model.config) is type(config) else ()
    drop_towers(model, towers)
    expected = getattr(config.get_text_config(), "num_hidden_layers", len(layers))
    check_states(model_type, model, trace.states)
    if trace.states:
        check_layers(model_type, getattr(config.get_text_config(), "layer_types", None), layers, trace.busy_layers)
        check_once(model_type, [call.module for call in trace.calls])
    else:
        check_attention(model_type, expected, len(layers), len(trace.calls))
    check_causality(model_type, trace.modules)
    check_positions(model_type, model, used=trace.uses_positions)
    hidden_size = config.get_text_config().hidden_size
    for call in trace.calls:
        if call.mask.misfit:
            raise UnsupportedModelError(
                f"model type '{model_type}' {call.mask.misfit} (in '{call.module}'); only causal and sliding-window attention "
                "can be paged and rolled back"
            )
    for call, kept in zip(trace.calls, masks.windows_of_cache(config, len(trace.calls)), strict=True):
        if kept is not None and kept < min(call.mask.window or longest, longest):
            raise UnsupportedModelError(
                f"model type '{model_type}' has a window of {kept} positions in its cache, but not in the mask of "
                f"'{call.module}': what it generates depends on how a prompt is cut into steps"
            )
    return Architecture(
        name=type(model).__name__,
        calls=tuple(trace.calls),
        layers=layers,
        vocab_size=trace.vocab_size,
        hidden_size=hidden_size,
        weight_bytes=sum(size for name, size in sizes.items() if not name.startswith(tuple(f"{t}." for t in towers))),
        context_length=longest,
        has_plain_stream=streams.are_plain(layers, hidden_size),
        tied_head_bytes=tied_head_bytes,
        context_note=note,
        tensor_kinds=frozenset(name.rpartition(".")[2] for name in model.state_dict()),
        buffer_bytes=sum(sizes[name] for name, _ in model.named_buffers() if name not in model.state_dict()),
        towers=towers,
        state_calls=tuple(trace.states),
        shards=shard_plan(model),
        linears=linears.over_all_tokens,
    )


def disable_padding_checks(model: Any) -> None:
    """Some models look for padding in their inputs: a host synchronisation that a packed batch does not need."""
    vars(model.config)["pad_token_id"] = None  # an assignment would be validated, and refused for some types


def _check_layer_types(config: Any, model_type: str) -> None:
    text = config.get_text_config()
    foreign = sorted(set(getattr(text, "layer_types", None) or ()) - KNOWN_TYPES)
    if foreign:
        raise UnsupportedModelError(
            f"model type '{model_type}' has layers of type {', '.join(foreign)}; only full and sliding-window attention, "
            "short convolutions and linear attention can be paged and rolled back"
        )


def _run(model: torch.nn.Module, model_type: str, dtype: torch.dtype) -> _Trace:
    trace = _Trace()
    for name, module in model.named_modules():
        module.__dict__[SITE] = _Recorder(name, module, trace)
    record_states(model, trace.states)
    disable_padding_checks(model)
    # Without a mask, the model's mask code would look for packed rows.
    attention_mask = torch.ones(1, _TRACE_TOKENS, dtype=torch.long, device="meta")
    ids = torch.zeros(1, _TRACE_TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(_TRACE_TOKENS, device="meta", dtype=torch.long)[None]
    keep = torch.tensor([1, _TRACE_TOKENS - 1], device="meta", dtype=torch.long)
    use = _Use(model)
    model.eval()
    try:
        with torch.no_grad(), use:
            logits = model(
                input_ids=ids,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=keep,
            ).logits
    except Exception as error:
        if dtype != torch.bfloat16:  # grouped expert kernels have a meta implementation for bfloat16 alone
            return _run(model.to(torch.bfloat16), model_type, torch.bfloat16)
        raise forward_failure(model_type, error) from error
    if logits.shape[1] != 2:
        raise UnsupportedModelError(
            f"model type '{model_type}' ignores logits_to_keep, which a packed batch needs; give a decoder-only model that "
            "takes it"
        )
    trace.vocab_size, trace.used, trace.uses_positions = logits.shape[-1], use.used, id(positions) in use.used
    return trace


def _decoder_layers(model: torch.nn.Module, trace: _Trace) -> tuple[str, ...]:
    names = trace.busy_layers
    if not trace.states or not names:
        return names
    holder = names[0].rpartition(".")[0]  # next to layers with state there may be some of an MLP alone
    return tuple(f"{holder}.{child}" for child, _ in model.get_submodule(holder).named_children())


def _sizes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the parameters and buffers by name, shared ones once."""
    return {name: t.numel() * t.element_size() for name, t in (*model.named_parameters(), *model.named_buffers())}


def _tied_head_bytes(model: Any) -> int:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not torch.nn.Linear or head.weight is not getattr(table, "weight", None):
        return 0
    return head.weight.numel() * head.weight.element_size()
