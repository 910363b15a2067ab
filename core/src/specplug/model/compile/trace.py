"""A step over paged KV as one graph of plain tensor operations, whatever its own code looks like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import fx

from specplug.model.attention.interface import AttentionSite
from specplug.model.compile.passes import fuse
from specplug.model.kv_cache import KVCache

# Sizes of free dimensions during tracing: all different, and none of them a size of a model.
EXAMPLE_TOKENS, EXAMPLE_LOGITS, EXAMPLE_PLAN, EXAMPLE_SEGMENTS, EXAMPLE_STATE_ROWS = 7, 5, 93, 11, 71
Step = Callable[..., Sequence[torch.Tensor]]


class FakeInputs:
    """Makes the fake tensors of one tracing."""

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
class TensorBatch:
    """A batch given by tensors alone, for native attention: inputs of a traced graph, or what a CUDA graph reads.

    Attributes:
        positions: int64 [T].
        plan: int32, the attention plan.
        write_slots: int64 [T].
        caches: keys and values, layer by layer.
    """

    positions: torch.Tensor
    plan: torch.Tensor
    write_slots: torch.Tensor
    caches: Sequence[torch.Tensor]
    is_native: bool = True

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """See `PagedBatch.attend`."""
        site = AttentionSite(self.caches[2 * layer], self.caches[2 * layer + 1])
        site.batch = self
        return site.attend(query[None], key[None], value[None], scaling, window, None, None)[0]


@attrs.frozen
class StepGraph:
    """A traced step.

    Attributes:
        module: the graph. Inputs: the weights, the KV cache (keys, values, layer by layer), positions [T], attention plan [P],
            write slots [T], and the step's own inputs. Outputs: those of the step. T, P, the cache's slots and the first
            dimension of the step's own inputs are free, everything else is fixed.
        inputs: fake tensors of the same shapes.
    """

    module: fx.GraphModule
    inputs: list[Any]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name, shared ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def tensors_of(cache: KVCache) -> list[torch.Tensor]:
    """Keys and values, layer by layer."""
    return [tensor for pair in zip(cache.keys, cache.values, strict=True) for tensor in pair]


def trace_step(
    step: Step, module: torch.nn.Module, caches: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> StepGraph:
    """Runs a step once on fake tensors and records what it does. Needs native attention.

    Args:
        step: called as `step(batch, *inputs)` with a `TensorBatch`.
        module: has all its weights.
        caches: keys and values, layer by layer.
        inputs: examples of its own inputs, with `EXAMPLE_TOKENS` or `EXAMPLE_LOGITS` rows.

    Raises:
        Exception: of any kind; the step's code depends on values and not on shapes alone, say.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx

    fake = FakeInputs()
    weights = weights_of(module)
    device = caches[0].device
    batch_inputs = (
        torch.zeros(EXAMPLE_TOKENS, dtype=torch.long, device=device),
        torch.zeros(EXAMPLE_PLAN, dtype=torch.int32, device=device),
        torch.zeros(EXAMPLE_TOKENS, dtype=torch.long, device=device),
    )
    fakes = [fake.fixed(tensor) for tensor in weights.values()]
    fakes += [fake.free(tensor, 1) for tensor in caches]
    fakes += [fake.free(tensor, 0) for tensor in (*batch_inputs, *inputs)]

    def run(*flat: Any) -> list[Any]:
        first = len(weights) + len(caches)
        own_weights = dict(zip(weights, flat[: len(weights)], strict=True))
        positions, plan, slots, *own_inputs = flat[first:]
        batch = TensorBatch(positions, plan, slots, flat[len(weights) : first])
        with torch.nn.utils.stateless._reparametrize_module(module, own_weights, tie_weights=True):
            return list(step(batch, *own_inputs))

    with torch.no_grad(), fake.mode, enable_python_dispatcher():  # older C++ decompositions want numbers for sizes
        graph = make_fx(run, tracing_mode="real")(*fakes)
    fuse(graph, device)
    return StepGraph(graph, fakes)
