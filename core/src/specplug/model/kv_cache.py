"""The storage of keys and values: one pair of tensors per layer, addressed by slots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch

from specplug.contract.resources import KVLayer
from specplug.model.device import to_device
from specplug.model.large_memory import allocate
from specplug.native.gpu import cuda


class KVCache:
    """Keys [heads, slots, key_dim] and values [heads, slots, value_dim] of every layer.

    Heads come first, so that a row whose blocks are contiguous is, per head, one dense matrix: attention on a CPU reads it
    as a view, at the memory's speed. Entries start as zeros: a masked entry is multiplied by 0, which NaN would survive.
    """

    def __init__(
        self, layers: Sequence[KVLayer], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = num_blocks * block_size
        self.layers = tuple(layers)
        self.num_slots = slots
        self.keys = [_zeros((layer.num_heads, slots, layer.key_dim), dtype, device) for layer in layers]
        self.values = [_zeros((layer.num_heads, slots, layer.value_dim), dtype, device) for layer in layers]

    @property
    def most_heads(self) -> int:
        """KV heads of the layer that has most."""
        return max(layer.num_heads for layer in self.layers)

    @cached_property
    def suits_gpu_kernels(self) -> bool:
        """Whether it lies on a GPU, and our own kernels can attend to it."""
        return self.keys[0].is_cuda and all(cuda.can_attend(tensor) for tensor in (*self.keys, *self.values))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def move(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies the entries of slots `sources` to slots `destinations`, in every layer; the sets may overlap."""
        if not sources:
            return
        device = self.keys[0].device
        read, write = to_device(sources, device), to_device(destinations, device)
        for tensor in (*self.keys, *self.values):
            tensor.index_copy_(1, write, tensor.index_select(1, read))

    def clear(self, slots: Sequence[int]) -> None:
        """Sets the entries of slots to zero, in every layer."""
        index = to_device(slots, self.keys[0].device)
        for tensor in (*self.keys, *self.values) if slots else ():
            tensor.index_fill_(1, index, 0)


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return allocate(math.prod(shape), dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)
