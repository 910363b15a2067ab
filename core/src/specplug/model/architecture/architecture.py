"""The facts about a model that planning and running need."""

from __future__ import annotations

import attrs
import torch

from specplug.contract.resources import KVLayer
from specplug.errors import UnsupportedModelError
from specplug.model.architecture.masks import Mask
from specplug.model.linears import LinearLayer
from specplug.model.load.int8 import int8_bytes
from specplug.model.load.packing import can_pack
from specplug.model.parallel.plan import ShardPlan, wildcards
from specplug.model.recurrent.layers import StateCall


@attrs.frozen
class AttentionCall:
    """One attention layer in the trace.

    Attributes:
        module: its name in the model.
        kv: what it stores per token.
        mask: its mask.
        num_heads: its query heads.
    """

    module: str
    kv: KVLayer
    mask: Mask = attrs.field(factory=Mask)
    num_heads: int = 0


@attrs.frozen
class Architecture:
    """The facts about a model that planning and running need.

    Attributes:
        name: the model class.
        calls: the attention layers, in the order they run.
        layers: the names of the decoder layers; boundary b of the residual stream enters layer b.
        vocab_size: the width of the logits.
        hidden_size: the width of the residual stream.
        weight_bytes: parameters and buffers in the dtype they are loaded in, shared ones once.
        context_length: the longest sequence that positions exist for.
        has_plain_stream: whether every layer gives the residual stream as one state per token; some carry several.
        tied_head_bytes: of an output layer that shares the embedding's table; 0 if it has its own.
        context_note: why `context_length` is shorter than the configuration says; empty if it is not.
        tensor_kinds: the last parts of its tensors' names, such as `weight`.
        buffer_bytes: of the buffers that no checkpoint stores, in `weight_bytes`.
        towers: the modules that text never reaches (images, sound); they are not loaded.
        state_calls: the calls that carry recurrent state from token to token, in the order they run.
        shards: how it is split over ranks.
        linears: the linear layers that an adapter can be added to.
        read_weights: linear layers that do not run as such: other code reads their weights.
        linear_shapes: outputs and inputs of its plain linear layers.
        linear_elements: of the weights of these that nothing else holds.
        reads_values: whether its forward branches on the values of tensors, so that it cannot be compiled or captured.
        loading_bytes: that reading the weights takes at its peak next to them; 0 where that is little.
    """

    name: str
    calls: tuple[AttentionCall, ...]
    layers: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    weight_bytes: int
    context_length: int
    has_plain_stream: bool = True
    tied_head_bytes: int = 0
    context_note: str = ""
    tensor_kinds: frozenset[str] = frozenset()
    buffer_bytes: int = 0
    towers: tuple[str, ...] = ()
    state_calls: tuple[StateCall, ...] = ()
    shards: ShardPlan = attrs.field(factory=ShardPlan)
    read_weights: tuple[str, ...] = ()
    linear_shapes: tuple[tuple[int, int], ...] = ()
    linear_elements: int = 0
    reads_values: bool = False
    loading_bytes: int = 0

    def in_int8(self, dtype: torch.dtype) -> Architecture:
        """The same with its linear layers in int8, and all else in `dtype`.

        Raises:
            UnsupportedModelError: there are no such layers.
        """
        change = int8_bytes(self.linear_shapes, dtype, self.name) - self.linear_elements * dtype.itemsize
        return attrs.evolve(self, weight_bytes=self.weight_bytes + change, tied_head_bytes=0)

    def of_rank(self, size: int) -> Architecture:
        """What one of `size` ranks holds of it.

        Where a layer's heads cannot be split evenly, every rank holds all of its attention.

        Raises:
            UnsupportedModelError: Transformers cannot split it.
        """
        if size == 1:
            return self
        if self.state_calls:
            raise UnsupportedModelError(
                f"tensor_parallel_size={size}: {self.name} keeps recurrent state, which cannot be split yet; use 1"
            )
        if self.reads_values:
            raise UnsupportedModelError(
                f"tensor_parallel_size={size}: {self.name} branches on the values of tensors, which was not tried with several "
                "ranks; use 1"
            )
        shards = self.shards.whole(*self._unsplittable(size))
        if not shards.split_bytes:
            raise UnsupportedModelError(
                f"tensor_parallel_size={size}: Transformers has no tensor parallel plan for {self.name}; use 1"
            )
        own = shards.kv_layers(self.kv_layers, size)
        return attrs.evolve(
            self,
            calls=tuple(attrs.evolve(call, kv=kv) for call, kv in zip(self.calls, own, strict=True)),
            weight_bytes=shards.weight_bytes(self.weight_bytes, size),
            shards=shards,
        )

    linears: tuple[LinearLayer, ...] = ()

    def loaded_bytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes of the weights as they are held: a packed output layer is a second copy of a tied table."""
        return self.weight_bytes + (self.tied_head_bytes if can_pack(dtype, device) else 0)

    def _unsplittable(self, size: int) -> set[str]:
        """Attention modules, or their keys and values, of which every one of `size` ranks needs all."""
        found = set()
        for call in self.calls:
            name, heads, kv_heads = wildcards(call.module), call.num_heads, call.kv.num_heads
            if heads % size or (kv_heads % size and kv_heads > 1):
                found.add(name)
            elif kv_heads == 1:
                found |= {f"{name}.k_proj", f"{name}.v_proj"}
        return found

    @property
    def kv_layers(self) -> tuple[KVLayer, ...]:
        """What the KV cache stores per token, layer by layer."""
        return tuple(call.kv for call in self.calls)
