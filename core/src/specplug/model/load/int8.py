"""Linear layers in int8: half the bytes that a step reads, with a scale per output.

Weights are quantised when they are loaded, symmetrically and to the nearest integer: `weight[o, i] ≈ integer[o, i] * scale[o]`,
where an output's largest weight becomes 127. Activations keep their dtype. Only plain `nn.Linear` layers are quantised, the
output layer among them: embeddings, norms, convolutions and the experts of a mixture are not such layers, and stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
from torch import nn

from specplug import native
from specplug.errors import CheckpointError, UnsupportedModelError
from specplug.model.huge_pages import allocate
from specplug.model.load.packing import PANEL, is_plain, linears_of, packed_shape

_LARGEST = 127
_SCALE_BYTES = torch.float32.itemsize
_OUTPUTS_AT_ONCE = 4096  # converted to float32 together


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] as int8 of the same shape and its float32 scales [out].

    Raises:
        CheckpointError: it holds values that are not finite.
    """
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for begin in range(0, len(weight), _OUTPUTS_AT_ONCE):
        some = slice(begin, begin + _OUTPUTS_AT_ONCE)
        wide = weight[some].float()
        largest = wide.abs().amax(1)
        if not bool(largest.isfinite().all()):
            raise CheckpointError("a linear layer holds weights that are not finite, which int8 cannot store")
        scales[some] = torch.where(largest > 0, largest / _LARGEST, 1.0)
        integers[some] = (wide / scales[some, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return integers, scales


def is_native(in_features: int, dtype: torch.dtype) -> bool:
    """Whether our own kernel runs an int8 layer on activations of this dtype; else PyTorch does."""
    return dtype == torch.bfloat16 and native.packs_bfloat16() and in_features % 2 == 0


def int8_shape(out_features: int, in_features: int, *, is_native: bool) -> tuple[int, int]:
    """The shape of a layer's int8 tensor: the integers; for our own kernel, panels with their scales.

    See `native/cpu/gemm/packed_weight.h`.
    """
    if not is_native:
        return out_features, in_features
    panels, elements = packed_shape(out_features, in_features)
    return panels, elements + PANEL * _SCALE_BYTES


class Int8Linear(nn.Module):
    """A linear layer in int8.

    Args:
        linear: the layer to replace; its weight is freed unless something else holds it.
        storage: int8 memory of `int8_shape`.
    """

    bias: torch.Tensor | None
    packed: torch.Tensor
    scales: torch.Tensor | None

    def __init__(self, linear: nn.Linear, storage: torch.Tensor) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach()
        self.is_native = is_native(self.in_features, weight.dtype)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)
        integers, scales = quantise(weight)
        if self.is_native:
            _fill_panels(storage, integers, scales)
        else:
            storage.copy_(integers)
        self.register_buffer("scales", None if self.is_native else scales, persistent=False)
        self.register_buffer("packed", storage, persistent=False)
        self._placeholder = torch.empty((), dtype=weight.dtype, device="cpu")

    @property
    def weight(self) -> torch.Tensor:
        """A placeholder with the weight's shape and dtype for code that reads these; it holds no values."""
        return self._placeholder.expand(self.out_features, self.in_features)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]. Sums are float32, and rounded once."""
        if self.is_native:
            return torch.ops.specplug.linear(states, self.packed, self.bias, self.out_features)
        assert self.scales is not None, "only the kernel's panels hold their scales"
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        parts = [nn.functional.linear(wide, some.to(wide.dtype)) for some in self.packed.split(_OUTPUTS_AT_ONCE)]
        sums = torch.cat(parts, -1) * self.scales
        return (sums if self.bias is None else sums + self.bias).to(states.dtype)


def _fill_panels(storage: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor) -> None:
    panels, pairs = len(storage), integers.shape[1] // 2
    padding = panels * PANEL - len(integers)
    integers, scales = nn.functional.pad(integers, (0, 0, 0, padding)), nn.functional.pad(scales, (0, padding))
    order = integers.view(panels, PANEL, pairs, 2).permute(0, 2, 1, 3)
    storage[:, : integers.shape[1] * PANEL].view(order.shape).copy_(order)
    storage[:, integers.shape[1] * PANEL :] = scales.view(panels, PANEL).view(torch.int8)


def quantise_linears(model: nn.Module, skip: Collection[str] = ()) -> int:
    """Replaces the plain linear layers of a module by their int8 form, in place; returns how many.

    Args:
        model: the module.
        skip: names of layers to leave as they are.

    Raises:
        CheckpointError: weights are not finite.
    """
    chosen = [each for each in linears_of(model, skip) if is_plain(each[2])]
    shapes = [
        int8_shape(child.out_features, child.in_features, is_native=is_native(child.in_features, child.weight.dtype))
        for _, _, child in chosen
    ]
    storages = list(allocate(sum(rows * width for rows, width in shapes), torch.int8).split([r * w for r, w in shapes]))
    count = len(chosen)
    while chosen:  # frees each layer, and so its weight, before the next is quantised
        parent, name, child = chosen.pop()
        setattr(parent, name, Int8Linear(child, storages.pop().view(shapes.pop())))
        del child
    return count


def linear_shapes(model: nn.Module, skip: Collection[str]) -> tuple[tuple[tuple[int, int], ...], int]:
    """Outputs and inputs of every plain linear layer, and the elements of those weights that nothing else holds."""
    linears = [linear for _, _, linear in linears_of(model, skip)]
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    own = Counter(id(linear.weight) for linear in linears)
    freed = {
        id(linear.weight): linear.weight.numel()
        for linear in linears
        if held[id(linear.weight)] == own[id(linear.weight)]
    }
    return tuple((linear.out_features, linear.in_features) for linear in linears), sum(freed.values())


def int8_bytes(shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, name: str) -> int:
    """Bytes of linear layers in int8, scales included.

    Raises:
        UnsupportedModelError: there are none.
    """
    if not shapes:
        raise UnsupportedModelError(f"quantization='int8': {name} has no plain linear layers; leave quantization out")
    total = 0
    for outs, ins in shapes:
        rows, width = int8_shape(outs, ins, is_native=is_native(ins, dtype))
        total += rows * width + (0 if is_native(ins, dtype) else outs * _SCALE_BYTES)
    return total
