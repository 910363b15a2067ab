"""Linear layers packed for the CPU: in the layout that the linear kernels read fastest.

In bfloat16 on a CPU, a plain `F.linear` rearranges its weight at every call; for the one to ten rows of a decoding step
that costs more than the matmul. Packed once, the weight is read at memory bandwidth: by our own kernel where it could be
compiled, else by oneDNN's. The packed form replaces the parameter; only a weight that is tied to the embedding exists twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from specplug import native
from specplug.model.huge_pages import allocate

PANEL = 32  # outputs of a panel; see `native/cpu/gemm/packed_weight.h`
_ROWS_HINT = 1
_MOST_PADDING = 0.03  # blocks are about 32 by 64: a small layer that would grow more stays plain, and the plan exact


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
    """Whether a layer's weight can be packed, by our own kernel's rules or by oneDNN's."""
    return (
        is_plain(linear)
        and can_pack(linear.weight.dtype, linear.weight.device)
        and (is_native(linear) or _has_onednn())
    )


def is_plain(linear: nn.Linear) -> bool:
    """Whether a layer is a matmul with the numbers of its weight.

    A weight that is a tensor subclass (quantised, distributed) is more than its numbers, and a layer whose forward was replaced
    or hooked does more than a matmul: both stay as they are.
    """
    weight: Any = getattr(linear, "weight", None)
    if type(weight) not in (nn.Parameter, torch.Tensor) or type(weight.data) is not torch.Tensor:
        return False
    return not ("forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks)


def packed_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """The shape of a weight in our own kernel's panels."""
    return -(-out_features // PANEL), in_features * PANEL


def is_native(linear: nn.Linear) -> bool:
    """Whether our own kernel runs a layer; else oneDNN's does."""
    return native.packs_bfloat16() and linear.in_features % 2 == 0


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed in panels, as the kernels read it.

    Args:
        linear: the layer to replace; its weight is freed unless something else holds it.
        storage: memory for the native kernel's panels, of `packed_shape`; without it, memory is allocated.
    """

    def __init__(self, linear: nn.Linear, storage: torch.Tensor | None = None) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.is_native = is_native(linear)
        weight = linear.weight.detach()
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)
        if self.is_native:
            if storage is None:
                storage = weight.new_empty(packed_shape(self.out_features, self.in_features))
            torch.ops.specplug.pack_weight(weight, storage)
            self.register_buffer("packed", storage, persistent=False)
        else:  # oneDNN's own kind of tensor, which cannot be a buffer
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._placeholder = torch.empty((), dtype=weight.dtype, device="cpu")

    @property
    def weight(self) -> torch.Tensor:
        """A placeholder with the weight's shape and dtype for code that reads these; it holds no values."""
        return self._placeholder.expand(self.out_features, self.in_features)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight, padding included."""
        return self.packed.nbytes if self.is_native else int(torch.ops.mkldnn._nbytes(self.packed))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        if self.is_native:
            return torch.ops.specplug.linear(states, self.packed, self.bias, self.out_features)
        return torch.ops.mkldnn._linear_pointwise(states, self.packed, self.bias, "none", [], "")


def pack_linears(model: nn.Module, skip: Collection[str] = ()) -> int:
    """Packs every linear layer of a module in place where that pays; returns how many.

    Core does this to the models it runs; a speculator does it to its own module, once the weights are loaded. Nothing
    happens on a GPU, in float32, or on a CPU without such kernels. Subclasses of `nn.Linear` may compute something else, and
    stay as they are. The values of a packed layer's `weight` cannot be read: call the layer, or name it in `skip`.
    """
    chosen = [each for each in linears_of(model, skip) if is_packable(each[2])]
    storages = _storages([child for _, _, child in chosen])
    count = 0
    while chosen:  # frees each layer, and so its weight, before the next is packed
        parent, name, child = chosen.pop()
        storage = storages.pop()
        if storage is None and is_native(child):
            continue
        packed = PackedLinear(child, storage)
        if packed.num_bytes <= _most_bytes(child):
            setattr(parent, name, packed)
            count += 1
        del child
    return count


def linears_of(model: nn.Module, skip: Collection[str]) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name in it, layer) of the linear layers whose full names are not in `skip`."""
    return [
        (parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and f"{path}.{name}".removeprefix(".") not in skip
    ]


def _storages(layers: Sequence[nn.Linear]) -> list[torch.Tensor | None]:
    """Parts of one allocation for weights that our own kernel runs; None for others, and where padding costs too much."""
    shapes = [packed_shape(layer.out_features, layer.in_features) for layer in layers]
    sizes = [
        math.prod(shape) if is_native(layer) and math.prod(shape) * layer.weight.itemsize <= _most_bytes(layer) else 0
        for layer, shape in zip(layers, shapes, strict=True)
    ]
    parts = allocate(sum(sizes), torch.bfloat16).split(sizes)
    return [part.view(shape) if len(part) else None for part, shape in zip(parts, shapes, strict=True)]


def _most_bytes(layer: nn.Linear) -> int:
    return int(layer.weight.nbytes * (1 + _MOST_PADDING))
