"""Gives single modules functions of their own in place of globals that their code calls."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch


def called_functions(module: torch.nn.Module, names: Collection[str]) -> dict[str, Callable[..., Any]]:
    """The functions of these names that a module's `forward` finds in its globals; in plain PyTorch where it is wrapped."""
    forward = _plain_forward(module)
    if forward is None:
        return {}
    found = {name: forward.__globals__.get(name) for name in names if name in forward.__code__.co_names}
    return {name: inspect.unwrap(function) for name, function in found.items() if callable(function)}


def mentions(module: torch.nn.Module, names: Collection[str]) -> bool:
    """Whether a module's `forward` uses a function, method or attribute of one of these names."""
    forward = _plain_forward(module)
    return forward is not None and not set(names).isdisjoint(forward.__code__.co_names)


def rebind(module: torch.nn.Module, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Makes `forward` of this module alone call other functions; nothing changes for other modules of its class."""
    forward = _plain_forward(module)
    assert forward is not None
    own = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, **functions},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    module.__dict__["forward"] = types.MethodType(own, module)


def restore(module: torch.nn.Module) -> None:
    """Takes `rebind` back."""
    module.__dict__.pop("forward", None)


def _plain_forward(module: torch.nn.Module) -> types.FunctionType | None:
    """The function under the decorators of a module's `forward`."""
    forward = inspect.unwrap(type(module).forward)
    return forward if isinstance(forward, types.FunctionType) else None
