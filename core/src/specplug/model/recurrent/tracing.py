"""Which calls of a model carry recurrent state, and which layers of it may be without any."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from specplug.errors import UnsupportedModelError
from specplug.model.recurrent.layers import StateCall
from specplug.model.recurrent.memory import Function, bind
from specplug.model.recurrent.pieces import PIECES
from specplug.model.recurrent.rebind import called_functions, mentions, rebind

ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention"})
_STATE_TYPES = frozenset({"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"})
_STATELESS_TYPES = frozenset({"moe", "mlp"})
KNOWN_TYPES = ATTENTION_TYPES | _STATE_TYPES | _STATELESS_TYPES | {"attention"}
_UPDATES = ("update_conv_state", "update_recurrent_state", "set_linear_cache")


def record_states(model: torch.nn.Module, calls: list[StateCall]) -> None:
    """Makes the modules of a model on the meta device note their calls that carry state, in place of making them."""
    for name, module in model.named_modules():
        functions = called_functions(module, PIECES)
        if functions:
            rebind(module, {each: _recorder(name, each, own, calls) for each, own in functions.items()})


def _recorder(module: str, name: str, function: Function, calls: list[StateCall]) -> Function:
    def record(*args: Any, **kwargs: Any) -> Any:
        sizes, result = PIECES[name].trace(bind(function, args, kwargs))
        calls.append(StateCall(module, name, sizes))
        return result

    return record


def check_states(model_type: str, model: torch.nn.Module, calls: Sequence[StateCall]) -> None:
    """Refuses a model with a layer that keeps a state by other means.

    Raises:
        UnsupportedModelError: a module updates a state in a cache, and no function for it is known.
    """
    known = {call.module for call in calls}
    for name, module in model.named_modules():
        if name not in known and mentions(module, _UPDATES):
            raise UnsupportedModelError(
                f"model type '{model_type}' keeps a recurrent state in '{name}' by code of its own; only short convolutions, "
                "gated delta rules and state-space scans through Transformers' functions for them can be rolled back"
            )


def check_layers(model_type: str, types: Sequence[str] | None, layers: Sequence[str], busy: Collection[str]) -> None:
    """Compares the layers of a model with recurrent state with its configuration.

    Args:
        model_type: of the configuration.
        types: of the layers; None if the configuration does not say.
        layers: their names.
        busy: those that attend or carry state.

    Raises:
        UnsupportedModelError: a layer does neither, and is not one of experts or an MLP alone.
    """
    for index, layer in enumerate(layers):
        kind = types[index] if types is not None and index < len(types) else ""
        if layer not in busy and kind not in _STATELESS_TYPES:
            raise UnsupportedModelError(
                f"model type '{model_type}' cannot be run: '{layer}' ({kind or 'of unknown type'}) neither calls Transformers' "
                "attention interface nor a function for recurrent state that specplug knows"
            )


def check_once(model_type: str, attended: Sequence[str]) -> None:
    """Refuses a model that calls one attention module several times: each call would need KV of its own.

    Raises:
        UnsupportedModelError: a name occurs twice.
    """
    if twice := next((name for name in attended if attended.count(name) > 1), None):
        raise UnsupportedModelError(
            f"model type '{model_type}' cannot be paged: '{twice}' attends {attended.count(twice)} times in one forward"
        )
