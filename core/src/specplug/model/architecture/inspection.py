"""Finds a model's layers, KV shapes and sizes by running it once on the meta device."""

from __future__ import annotations

import copy
import functools
from typing import Any

import attrs
import torch

from specplug.errors import UnsupportedModelError
from specplug.model.architecture import masks
from specplug.model.architecture.architecture import Architecture
from specplug.model.architecture.max_length import (
    CHUNKED,
    LENGTH_DEPENDENT_ROPE,
    context_length,
    context_note,
    rope_parameters,
)
from specplug.model.architecture.refusal import (
    build_failure,
    check_attention,
    check_causality,
    check_kind,
    check_positions,
)
from specplug.model.architecture.trace import TRACE_TOKENS, Streams, Trace, recording_interface, run_trace
from specplug.model.linears import LinearUses
from specplug.model.load.int8 import linear_shapes
from specplug.model.load.library_output import quiet_transformers
from specplug.model.load.wrappers import drop_towers, find_towers, make_model
from specplug.model.parallel.plan import shard_plan
from specplug.model.recurrent.tracing import KNOWN_TYPES, check_layers, check_once, check_states


@attrs.frozen
class _Question:
    """What the answer depends on; equal configurations of one class are one question."""

    kind: type
    content: str
    dtype: torch.dtype
    config: Any = attrs.field(eq=False)


def inspect_architecture(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Architecture:
    """Traces a model from its configuration alone.

    Answers are kept: the next engine with such a target or draft starts in half the time. Those of code from a checkpoint
    are not, since that may change.

    Raises:
        UnsupportedModelError: the model does not run every layer's attention through Transformers' attention interface,
            keeps recurrent state, or needs positions that a packed batch cannot give.
    """
    if trust_remote_code:
        return _inspect(config, dtype, trust_remote_code=True)
    config = copy.deepcopy(config)
    config.name_or_path = ""  # the same model may be in several folders
    return _known(_Question(type(config), config.to_json_string(use_diff=False), dtype, config))


@functools.lru_cache(maxsize=16)
def _known(question: _Question) -> Architecture:
    return _inspect(question.config, question.dtype, trust_remote_code=False)


def _inspect(config: Any, dtype: torch.dtype, *, trust_remote_code: bool) -> Architecture:
    masks.register(recording_interface)
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
    streams, linears = Streams(model), LinearUses(model, TRACE_TOKENS)
    trace = run_trace(model, model_type, dtype)
    layers = _decoder_layers(model, trace)
    towers = find_towers(model, layers, trace.used) if type(model.config) is type(config) else ()
    drop_towers(model, towers)
    read_weights = tuple(
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and id(module) not in trace.used and id(module.weight) in trace.used
    )
    shapes, elements = linear_shapes(model, read_weights)
    expected = getattr(config.get_text_config(), "num_hidden_layers", len(layers))
    check_states(model_type, model, trace.states)
    if trace.states:
        check_layers(model_type, getattr(config.get_text_config(), "layer_types", None), layers, trace.busy_layers)
        check_once(model_type, [call.module for call in trace.calls])
    else:
        check_attention(model_type, expected, len(layers), [call.module for call in trace.calls])
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
        linears=() if trace.reads_values else linears.over_all_tokens,  # else an expert's may be among them
        reads_values=trace.reads_values,
        read_weights=read_weights,
        linear_shapes=shapes,
        linear_elements=elements,
    )


def _check_layer_types(config: Any, model_type: str) -> None:
    text = config.get_text_config()
    foreign = sorted(set(getattr(text, "layer_types", None) or ()) - KNOWN_TYPES - {CHUNKED})
    if foreign:
        raise UnsupportedModelError(
            f"model type '{model_type}' has layers of type {', '.join(foreign)}; only full and sliding-window attention, "
            "short convolutions and linear attention can be paged and rolled back"
        )


def _decoder_layers(model: torch.nn.Module, trace: Trace) -> tuple[str, ...]:
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
