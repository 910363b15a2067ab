"""Linear layers in the layout that the CPU's matrix kernels read fastest.

In bfloat16 on a CPU, a plain `F.linear` rearranges its weight at every call; for the one to ten rows of a decoding step
that costs more than the product. Packed once, the same weight is read at the memory's speed: by our own kernel where that
could be compiled, else by oneDNN's. The packed form replaces the parameter; only a table that is tied to the embedding
exists twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from specplug import native
from specplug.model.huge_pages import allocate

PANEL = 32  # outputs side by side; see `linear.h`
_ROWS_HINT = 1
_MOST_PADDING = 0.03  # blocks are 32 by 64 or so; a small layer that they would blow up stays plain, and the plan exact


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this dtype on this device are packed."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and ((native.load() and native.packs_bfloat16()) or _has_onednn())
    )


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_packable(linear: nn.Linear) -> bool:
    """Whether a layer's weight can be packed, by our own kernel's rules or by oneDNN's.

    A weight of a tensor class of its own (quantised, distributed) is more than its numbers, and a layer whose forward was
    replaced or hooked does more than multiply: both stay as they are.
    """
    weight: Any = getattr(linear, "weight", None)
    if type(weight) not in (nn.Parameter, torch.Tensor) or type(weight.data) is not torch.Tensor:
        return False
    if "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks:
        return False
    return can_pack(linear.weight.dtype, linear.weight.device) and (is_native(linear) or _has_onednn())


def packed_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Of a weight in our own kernel's panels; see `linear.h`."""
    return -(-out_features // PANEL), in_features * PANEL


def is_native(linear: nn.Linear) -> bool:
    """Whether our own kernel takes a layer; else oneDNN does."""
    return native.packs_bfloat16() and linear.in_features % 2 == 0


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in panels, as the matrix kernels read it.

    Args:
        linear: the layer to take over; its weight is let go unless something else holds it.
        room: where the native kernel's panels are to lie, of `packed_shape`; without it, memory is allocated.
    """

    def __init__(self, linear: nn.Linear, room: torch.Tensor | None = None) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.is_native = is_native(linear)
        weight = linear.weight.detach()
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)
        if self.is_native:
            if room is None:
                room = weight.new_empty(packed_shape(self.out_features, self.in_features))
            torch.ops.specplug.pack_weight(weight, room)
            self.register_buffer("packed", room, persistent=False)
        else:  # oneDNN's own kind of tensor, which no buffer can be
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._stand_in = torch.empty((), dtype=weight.dtype, device="cpu")

    @property
    def weight(self) -> torch.Tensor:
        """A stand-in with the weight's shape and dtype for code that asks for these; it holds no values."""
        return self._stand_in.expand(self.out_features, self.in_features)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight, padding included."""
        return self.packed.nbytes if self.is_native else int(torch.ops.mkldnn._nbytes(self.packed))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        if self.is_native:
            return torch.ops.specplug.linear(states, self.packed, self.bias, self.out_features)
        return torch.ops.mkldnn._linear_pointwise(states, self.packed, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> int:
    """Packs every linear layer of a module in place where that pays; returns how many.

    Core does this to the models it runs; a speculator does it to a module of its own, once its weights are there. Nothing
    happens on a GPU, in float32, or on a CPU without such kernels. Subclasses of `nn.Linear` may compute something else, and
    stay as they are. A packed layer has no `weight` that could be read: call the layer.
    """
    chosen = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and is_packable(child)
    ]
    rooms = _rooms([child for _, _, child in chosen])
    count = 0
    while chosen:  # which lets go of each layer, and so of its weight, before the next is packed
        parent, name, child = chosen.pop()
        room = rooms.pop()
        if room is None and is_native(child):
            continue
        packed = PackedLinear(child, room)
        if packed.num_bytes <= _most_bytes(child):
            setattr(parent, name, packed)
            count += 1
        del child
    return count


def _rooms(layers: Sequence[nn.Linear]) -> list[torch.Tensor | None]:
    """Parts of one piece of memory for weights that our own kernel takes; None for others, and where padding costs too much."""
    shapes = [packed_shape(layer.out_features, layer.in_features) for layer in layers]
    sizes = [
        math.prod(shape) if is_native(layer) and math.prod(shape) * layer.weight.itemsize <= _most_bytes(layer) else 0
        for layer, shape in zip(layers, shapes, strict=True)
    ]
    parts = allocate(sum(sizes), torch.bfloat16).split(sizes)
    return [part.view(shape) if len(part) else None for part, shape in zip(parts, shapes, strict=True)]


def _most_bytes(layer: nn.Linear) -> int:
    return int(layer.weight.nbytes * (1 + _MOST_PADDING))
