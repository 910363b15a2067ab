"""The linear layers of a model that run over all tokens of a batch, so that an adapter can be added to them."""

from __future__ import annotations

from typing import Any

import attrs
import torch

_KINDS = ("Linear", "Conv1D")  # GPT-2's Conv1D is a linear with a transposed weight


@attrs.frozen
class LinearLayer:
    """A linear layer.

    Attributes:
        name: its name in the model.
        in_features: the width of what it reads.
        out_features: the width of what it writes.
    """

    name: str
    in_features: int
    out_features: int


class LinearUses:
    """Records the linear layers of a model that run.

    Args:
        model: the model.
        num_tokens: of the batch that will be run.
    """

    def __init__(self, model: torch.nn.Module, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._found: dict[str, LinearLayer] = {}
        self._others: set[str] = set()
        for name, module in model.named_modules():
            if type(module).__name__ in _KINDS:
                module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if args and args[0].shape[:-1].numel() == output.shape[:-1].numel() == self._num_tokens:
                self._found[name] = LinearLayer(name, args[0].shape[-1], output.shape[-1])
            else:
                self._others.add(name)

        return hook

    @property
    def over_all_tokens(self) -> tuple[LinearLayer, ...]:
        """Those that ran over all tokens each time, in the order they ran first: not the output layer, nor single experts."""
        return tuple(layer for name, layer in self._found.items() if name not in self._others)
