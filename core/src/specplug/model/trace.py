"""A model's packed forward as one graph of plain tensor operations, whatever the model's own code looks like."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import fx

if TYPE_CHECKING:
    from specplug.model.attention import AttentionSite
    from specplug.model.taps import Taps

_EXAMPLE_TOKENS, _EXAMPLE_LOGITS, _EXAMPLE_PLAN = 7, 5, 93  # no two alike, and none that is a size of a model


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
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    weights = weights_of(model)
    names = list(weights)
    caches = [tensor for site in sites for tensor in (site.keys, site.values)]
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def free(tensor: torch.Tensor, dimension: int) -> Any:
        sizes = [DimDynamic.DYNAMIC if index == dimension else DimDynamic.STATIC for index in range(tensor.dim())]
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, symbolic_context=context)

    fixed = [mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in weights.values()]
    fixed += [free(tensor, 1) for tensor in caches]
    batch = [
        free(torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.long), 1),
        free(torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.long), 1),
        free(torch.zeros(_EXAMPLE_PLAN, dtype=torch.int32), 0),
        free(torch.zeros(_EXAMPLE_TOKENS, dtype=torch.long), 0),
        free(torch.zeros(_EXAMPLE_LOGITS, dtype=torch.long), 0),
    ]

    def forward(*flat: Any) -> list[Any]:
        own_weights = dict(zip(names, flat[: len(names)], strict=True))
        own_caches = flat[len(names) : len(names) + len(caches)]
        ids, positions, plan, slots, keep = flat[len(names) + len(caches) :]
        traced = TracedBatch(plan, slots)
        for index, site in enumerate(sites):
            site.keys, site.values = own_caches[2 * index : 2 * index + 2]
            site.batch = traced
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False, "logits_to_keep": keep}
        output = torch.func.functional_call(model, own_weights, (), inputs)
        return [output.logits, *(taps.captured[boundary] for boundary in taps.boundaries)]

    try:
        with torch.no_grad(), mode:
            module = make_fx(forward, tracing_mode="real")(*fixed, *batch)
    finally:
        taps.captured.clear()
        for index, site in enumerate(sites):
            site.keys, site.values = caches[2 * index : 2 * index + 2]
            site.batch = None
    join_products(module)
    return ForwardGraph(module, [*fixed, *batch])


def join_products(module: fx.GraphModule) -> int:
    """Products of the same rows (query, key and value; gate and up) become one operation; returns how many it made."""
    graph = module.graph
    linear = torch.ops.specplug.linear.default
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is linear:
            groups[node.args[0]].append(node)
    joined = 0
    for states, nodes in groups.items():
        if len(nodes) == 1:
            continue
        columns = [list(column) for column in zip(*(node.args[1:] for node in nodes), strict=True)]
        with graph.inserting_before(nodes[0]):
            together = graph.call_function(torch.ops.specplug.linears.default, (states, *columns))
            together.meta["val"] = [node.meta["val"] for node in nodes]
            for index, node in enumerate(nodes):
                part = graph.call_function(operator.getitem, (together, index))
                part.meta = dict(node.meta)
                node.replace_all_uses_with(part)
        for node in nodes:
            graph.erase_node(node)
        joined += 1
    graph.lint()
    module.recompile()
    return joined
