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
    from torch._dispatch.python import enable_python_dispatcher
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
    device = caches[0].device
    batch = [
        free(torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.long, device=device), 1),
        free(torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.long, device=device), 1),
        free(torch.zeros(_EXAMPLE_PLAN, dtype=torch.int32, device=device), 0),
        free(torch.zeros(_EXAMPLE_TOKENS, dtype=torch.long, device=device), 0),
        free(torch.zeros(_EXAMPLE_LOGITS, dtype=torch.long, device=device), 0),
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
        with torch.no_grad(), mode, enable_python_dispatcher():  # older C++ decompositions want numbers for sizes
            module = make_fx(forward, tracing_mode="real")(*fixed, *batch)
    finally:
        taps.captured.clear()
        for index, site in enumerate(sites):
            site.keys, site.values = caches[2 * index : 2 * index + 2]
            site.batch = None
    if device.type == "cuda":
        take_products(module)
    join_products(module)
    return ForwardGraph(module, [*fixed, *batch])


def take_products(module: fx.GraphModule) -> int:
    """Products with a weight become our own operation, as packed ones on a CPU are; returns how many."""
    aten = torch.ops.aten
    views = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
    graph, taken = module.graph, 0
    for node in list(graph.nodes):
        bias: Any = None
        states: Any
        weight: Any
        if node.target is aten.mm.default:
            states, weight = node.args
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, states, weight = node.args
        else:
            continue
        if weight.target is not aten.t.default or weight.args[0].op != "placeholder":
            continue
        if bias is not None and (bias.op != "placeholder" or bias.meta["val"].dim() != 1):
            continue
        if states.target in views and states.args[0].meta["val"].shape[-1] == states.meta["val"].shape[-1]:
            states = states.args[0]  # products of the same rows are to be seen as such
        size = weight.meta["val"].shape[1]
        with graph.inserting_before(node):
            product = graph.call_function(torch.ops.specplug.linear.default, (states, weight.args[0], bias, int(size)))
            product.meta["val"] = states.meta["val"].new_empty(*states.meta["val"].shape[:-1], int(size))
            flat = graph.call_function(aten.reshape.default, (product, [-1, int(size)]))
            flat.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(flat)
        graph.erase_node(node)
        taken += 1
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return taken


def join_products(module: fx.GraphModule) -> int:
    """Products of the same rows (query, key and value; gate and up) become one operation; returns how many it made."""
    from specplug.native.operators import JOINED

    graph = module.graph
    linear = torch.ops.specplug.linear.default
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is linear:
            groups[node.args[0]].append(node)
    made = 0
    for states, nodes in groups.items():
        for begin in range(0, len(nodes), max(JOINED)):
            some = nodes[begin : begin + max(JOINED)]
            if len(some) == 1:
                continue
            arguments = [
                argument for column in zip(*(node.args[1:] for node in some), strict=True) for argument in column
            ]
            with graph.inserting_before(some[0]):
                together = graph.call_function(JOINED[len(some)], (states, *arguments))
                together.meta["val"] = tuple(node.meta["val"] for node in some)
                for index, node in enumerate(some):
                    part = graph.call_function(operator.getitem, (together, index))
                    part.meta = dict(node.meta)
                    node.replace_all_uses_with(part)
            for node in some:
                graph.erase_node(node)
            made += 1
    graph.lint()
    module.recompile()
    return made
