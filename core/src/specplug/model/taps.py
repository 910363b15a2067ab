"""Capturing the residual stream at the boundaries that speculators ask for, only there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specplug.contract.types import Boundary


class Taps:
    """Forward hooks on the decoder layers of one model; `captured[b]` is [T, hidden] of the last forward.

    The order of `captured` is the order in which the model computes the boundaries, not that of `boundaries`.

    Boundary b < L is what enters layer b, L is what leaves the last layer before the final norm, `final` is what
    the stack of layers returns, after it.
    """

    def __init__(self, model: torch.nn.Module, layers: Sequence[str], boundaries: Sequence[Boundary]) -> None:
        self.captured: dict[int | str, torch.Tensor] = {}
        self.boundaries = tuple(dict.fromkeys(boundaries))
        self._handles = []
        for boundary in self.boundaries:
            if boundary == "final":
                stack = model.get_submodule(layers[0].rsplit(".", 2)[0])  # some models bypass their base model
                handle = stack.register_forward_hook(self._keep_output(boundary))
            elif boundary == len(layers):
                handle = model.get_submodule(layers[-1]).register_forward_hook(self._keep_output(boundary))
            else:
                layer = model.get_submodule(layers[boundary])
                handle = layer.register_forward_pre_hook(self._keep_input(boundary), with_kwargs=True)
            self._handles.append(handle)

    def _keep_input(self, boundary: Boundary) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.captured[boundary] = hidden[0]

        return hook

    def _keep_output(self, boundary: Boundary) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            self.captured[boundary] = hidden[0]

        return hook

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.captured.clear()
