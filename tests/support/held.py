"""Bytes that a model's weights take, the parts of quantised tensors included."""

from __future__ import annotations

from typing import Any

import torch

from specplug.model.load.packing import PackedLinear


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of all storages that parameters and buffers refer to, each once."""
    found: dict[int, int] = {}

    def add(tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
            return
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        state = getattr(tensor, "quant_state", None)  # of bitsandbytes: 4 bit, and its 8 bit
        for part in (state, getattr(state, "state2", None)):
            add(getattr(part, "absmax", None))
            add(getattr(part, "code", None))
        add(getattr(tensor, "SCB", None))

    for tensor in (*model.parameters(), *model.buffers()):
        add(tensor)
    for tensor in (value for part in model.modules() for value in vars(part).values()):
        add(tensor)
    packed = [part for part in model.modules() if isinstance(part, PackedLinear) and not part.is_native]
    return sum(found.values()) + sum(part.num_bytes for part in packed)
