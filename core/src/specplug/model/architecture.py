"""What a model is made of, learnt by running it once on the meta device: no weights, no config formulas.

The traced call of every attention layer says what the KV cache must store (multi-head latent attention, for example,
shows its expanded keys and values here) and whether the model can be run packed at all.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import attrs
import torch

from specplug.contract.memory import KVLayer
from specplug.errors import UnsupportedModelError
from specplug.model import attention, masks
from specplug.model.masks import Mask
from specplug.model.packing import can_pack

_LAYER_NAME = re.compile(r"^(.*?\.\d+)\.")
_TRACE_TOKENS = 6
_LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")


@attrs.frozen
class AttentionCall:
    """One attention layer as the trace saw it.

    Attributes:
        module: its name in the model.
        kv: what it stores per token.
        mask: which keys its queries see.
    """

    module: str
    kv: KVLayer
    mask: Mask = attrs.field(factory=Mask)


@attrs.frozen
class Architecture:
    """The facts about a model that the engine plans and runs by.

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

    def loaded_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes of the weights as they are held: a packed output layer is a second copy of a tied table."""
        return self.weight_bytes + (self.tied_head_bytes if can_pack(dtype, device) else 0)

    @property
    def kv_layers(self) -> tuple[KVLayer, ...]:
        """What the KV cache stores per token, layer by layer."""
        return tuple(call.kv for call in self.calls)


class _Recorder:
    """Stands in for an attention site during the trace."""

    def __init__(self, module: str, calls: list[AttentionCall]) -> None:
        self._module = module
        self._calls = calls

    def record(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        kv = KVLayer(key.shape[1], key.shape[3], value.shape[3])
        self._calls.append(AttentionCall(self._module, kv, masks.read_mask(attention_mask)))
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _recording_interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    return module.__dict__[attention.SITE].record(query, key, value, attention_mask), None


class _Streams:
    """Shapes of what numbered modules, among them the decoder layers, give during the trace."""

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
    from transformers import AutoModelForCausalLM

    masks.register(_recording_interface)
    config = copy.deepcopy(config)
    model_type = getattr(config, "model_type", "unknown")
    _check_layer_types(config, model_type)
    longest = context_length(config)
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:  # would read positions, which the meta device cannot
            parameters["rope_type"] = "default"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=masks.RECORDING, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # whatever a model's own code makes of its configuration
        raise UnsupportedModelError(
            f"model type '{model_type}' cannot be built with a pluggable attention: {type(error).__name__}: {error}"
        ) from error
    weight_bytes = _unique_bytes(model)
    tied_head_bytes = _tied_head_bytes(model)
    streams = _Streams(model)
    calls, width = _trace(model, model_type, dtype)
    layers = _decoder_layers(calls)
    hidden_size = config.get_text_config().hidden_size
    expected = getattr(config, "num_hidden_layers", len(layers))
    if len(calls) != expected or len(layers) != expected:
        raise UnsupportedModelError(
            f"model type '{model_type}' runs {len(calls)} of its {expected} layers through Transformers' attention "
            "interface; all are needed (hybrid, recurrent and custom-attention models are not supported)"
        )
    for call in calls:
        if call.mask.misfit:
            raise UnsupportedModelError(
                f"model type '{model_type}' {call.mask.misfit} (in '{call.module}'); only causal and sliding-window attention "
                "can be paged and rolled back"
            )
    for call, kept in zip(calls, masks.windows_of_cache(config, len(calls)), strict=True):
        if kept is not None and kept < min(call.mask.window or longest, longest):
            raise UnsupportedModelError(
                f"model type '{model_type}' has a window of {kept} positions in its cache, but not in the mask of "
                f"'{call.module}': what it generates depends on how a prompt is cut into steps"
            )
    return Architecture(
        name=type(model).__name__,
        calls=tuple(calls),
        layers=layers,
        vocab_size=width,
        hidden_size=hidden_size,
        weight_bytes=weight_bytes,
        context_length=longest,
        has_plain_stream=streams.are_plain(layers, hidden_size),
        tied_head_bytes=tied_head_bytes,
    )


def check_text_model(config: Any) -> None:
    """Refuses a configuration of several text models at once (an encoder and a decoder, for example).

    Raises:
        UnsupportedModelError: it is one.
    """
    try:
        config.get_text_config()
    except ValueError as error:
        kind = getattr(config, "model_type", "unknown")
        raise UnsupportedModelError(
            f"model type '{kind}' holds several text models, of which none is a causal LM by itself"
        ) from error


def context_length(config: Any) -> int:
    """The longest sequence the model has positions for.

    RoPE variants whose frequencies depend on the length would let packed rows change each other's: they are bounded by the
    length up to which their frequencies are constant.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1 << 20
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            original = parameters.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            length = min(length, original or length)
    return int(length)


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The RoPE settings: one mapping, or one per type of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [value for value in rope.values() if isinstance(value, dict)] or [rope]


def disable_padding_checks(model: Any) -> None:
    """Some models look for padding in their inputs, a host synchronisation a packed batch has no use for."""
    vars(model.config)["pad_token_id"] = None  # not by assignment: some configurations refuse None there


def _check_layer_types(config: Any, model_type: str) -> None:
    text = config.get_text_config()
    known = {"full_attention", "sliding_attention"}
    foreign = sorted(set(getattr(text, "layer_types", None) or ()) - known)
    if foreign:
        raise UnsupportedModelError(
            f"model type '{model_type}' has layers of type {', '.join(foreign)}; only full and sliding-window attention "
            "can be paged and rolled back"
        )


def _trace(model: torch.nn.Module, model_type: str, dtype: torch.dtype) -> tuple[list[AttentionCall], int]:
    calls: list[AttentionCall] = []
    for name, module in model.named_modules():
        module.__dict__[attention.SITE] = _Recorder(name, calls)
    disable_padding_checks(model)
    seen = torch.ones(
        1, _TRACE_TOKENS, dtype=torch.long, device="meta"
    )  # else the mask code would look for packed rows
    ids = torch.zeros(1, _TRACE_TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(_TRACE_TOKENS, device="meta")[None]
    keep = torch.tensor([1, _TRACE_TOKENS - 1], device="meta")
    model.eval()
    try:
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False, logits_to_keep=keep
            ).logits
    except Exception as error:
        if dtype != torch.bfloat16:  # grouped expert kernels have a meta implementation for bfloat16 alone
            return _trace(model.to(torch.bfloat16), model_type, torch.bfloat16)
        reason = "it does not use Transformers' attention interface" if isinstance(error, KeyError) else str(error)
        raise UnsupportedModelError(
            f"model type '{model_type}' cannot run as a packed batch: {reason} ({type(error).__name__})"
        ) from error
    if logits.shape[1] != 2:
        raise UnsupportedModelError(f"model type '{model_type}' ignores logits_to_keep, which a packed batch needs")
    return calls, logits.shape[-1]


def _decoder_layers(calls: list[AttentionCall]) -> tuple[str, ...]:
    names = [match.group(1) for call in calls if (match := _LAYER_NAME.match(call.module))]
    return tuple(dict.fromkeys(names))


def _unique_bytes(model: torch.nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _tied_head_bytes(model: Any) -> int:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not torch.nn.Linear or head.weight is not getattr(table, "weight", None):
        return 0
    return head.weight.numel() * head.weight.element_size()
