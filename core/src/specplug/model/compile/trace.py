"""A model's packed forward as one graph of plain tensor operations, whatever the model's own code looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import fx

from specplug.model.compile.passes import fuse

if TYPE_CHECKING:
    from specplug.model.attention.interface import AttentionSite
    from specplug.model.taps import Taps


# Sizes of free dimensions while code is traced: no two alike, and none that is a size of a model.
EXAMPLE_TOKENS, EXAMPLE_LOGITS, EXAMPLE_PLAN = 7, 5, 93


class FakeInputs:
    """Makes fake tensors of one tracing."""

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self.mode = FakeTensorMode(shape_env=ShapeEnv())

    def fixed(self, tensor: torch.Tensor) -> Any:
        """One whose sizes are part of what is compiled."""
        return self.mode.from_tensor(tensor.detach(), static_shapes=True)

    def free(self, tensor: torch.Tensor, dimension: int) -> Any:
        """One with a dimension that may have any size at every call."""
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

        sizes = [DimDynamic.DYNAMIC if index == dimension else DimDynamic.STATIC for index in range(tensor.dim())]
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
        return self.mode.from_tensor(tensor, symbolic_context=context)


@attrs.frozen
class TracedBatch:
    """Stands in for a `ForwardBatch` while a model is traced: what native attention needs, as inputs of the graph."""

    plan: torch.Tensor
    write_slots: torch.Tensor
    is_native: bool = True


@attrs.frozen
class ForwardGraph:
    """A traced forward.

    Attributes:
        module: the graph. Inputs: the weights, the KV cache (keys, values, layer by layer), input_ids [1, T],
            position_ids [1, T], attention plan [P], write slots [T], logits index [L]. Outputs: logits [1, L, vocabulary],
            then the captured states [T, hidden] in the order of the taps' boundaries. T, L, P and the cache's slots are free,
            everything else is fixed.
        inputs: fake tensors of the same shapes.
    """

    module: fx.GraphModule
    inputs: list[Any]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name, shared ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def trace_forward(model: torch.nn.Module, sites: Sequence[AttentionSite], taps: Taps) -> ForwardGraph:
    """Runs the model once on fake tensors and records what it does. Needs native attention.

    Raises:
        Exception: of any kind; the model's code depends on values and not on shapes alone, say.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx

    weights = weights_of(model)
    names = list(weights)
    caches = [tensor for site in sites for tensor in (site.keys, site.values)]
    device = caches[0].device
    fake = FakeInputs()
    inputs = [fake.fixed(tensor) for tensor in weights.values()]
    inputs += [fake.free(tensor, 1) for tensor in caches]
    inputs += [
        fake.free(torch.zeros(1, EXAMPLE_TOKENS, dtype=torch.long, device=device), 1),
        fake.free(torch.zeros(1, EXAMPLE_TOKENS, dtype=torch.long, device=device), 1),
        fake.free(torch.zeros(EXAMPLE_PLAN, dtype=torch.int32, device=device), 0),
        fake.free(torch.zeros(EXAMPLE_TOKENS, dtype=torch.long, device=device), 0),
        fake.free(torch.zeros(EXAMPLE_LOGITS, dtype=torch.long, device=device), 0),
    ]

    def forward(*flat: Any) -> list[Any]:
        own_weights = dict(zip(names, flat[: len(names)], strict=True))
        own_caches = flat[len(names) : len(names) + len(caches)]
        ids, positions, plan, slots, keep = flat[len(names) + len(caches) :]
        traced = TracedBatch(plan, slots)
        for index, site in enumerate(sites):
            site.keys, site.values = own_caches[2 * index : 2 * index + 2]
            site.batch = traced
        named = {"input_ids": ids, "position_ids": positions, "use_cache": False, "logits_to_keep": keep}
        output = torch.func.functional_call(model, own_weights, (), named)
        return [output.logits, *(taps.captured[boundary] for boundary in taps.boundaries)]

    try:
        with torch.no_grad(), fake.mode, enable_python_dispatcher():  # older C++ decompositions want numbers for sizes
            module = make_fx(forward, tracing_mode="real")(*inputs)
    finally:
        taps.captured.clear()
        for index, site in enumerate(sites):
            site.keys, site.values = caches[2 * index : 2 * index + 2]
            site.batch = None
    fuse(module, device)
    return ForwardGraph(module, inputs)
