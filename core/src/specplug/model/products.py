"""A traced graph's products with weights, rewritten as the operations that are fastest for a few rows."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx


def fuse_products(module: fx.GraphModule, device: torch.device) -> None:
    """All of the below, as far as the device has the operations: gates are a CPU's."""
    if device.type == "cuda":
        take_products(module)
    join_products(module)
    if device.type == "cpu":
        gate_products(module)


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


def gate_products(module: fx.GraphModule) -> int:
    """Of two products of the same rows, where one is activated and multiplied with the other, one operation; returns how many.

    The rows in between, twice as wide as a model's own, are then never written.
    """
    from specplug.native.operators import ACTIVATIONS

    graph, made = module.graph, 0
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.mul.Tensor:
            continue
        arguments: Any
        for activated, factor in (node.args, node.args[::-1]):
            found = _gate(activated, factor)
            if found is None:
                continue
            both, first, name = found
            states, *packed_and_biases = both.args[:5]
            packed, biases = packed_and_biases[:2], packed_and_biases[2:]
            gate, up = (0, 1) if first else (1, 0)
            arguments = (states, packed[gate], packed[up], biases[gate], biases[up], both.args[5], ACTIVATIONS[name])
            with graph.inserting_before(node):
                gated = graph.call_function(torch.ops.specplug.gated_linears.default, arguments)
            gated.meta = dict(node.meta)
            node.replace_all_uses_with(gated)
            graph.erase_node(node)
            made += 1
            break
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return made


def _gate(activated: Any, factor: Any) -> tuple[fx.Node, bool, str] | None:
    """Two products of which nothing else is made than their gated product: these, whether the first is the gate, its name."""
    aten = torch.ops.aten
    if any(not isinstance(node, fx.Node) or len(node.users) > 1 for node in (activated, factor)):
        return None
    if activated.target is aten.silu.default:
        name = "silu"
    elif activated.target is aten.gelu.default and activated.kwargs.get("approximate") == "tanh":
        name = "gelu_tanh"
    else:
        return None
    gate: Any = activated.args[0]
    if gate.target is not operator.getitem or factor.target is not operator.getitem or len(gate.users) > 1:
        return None
    both: Any = gate.args[0]
    if both is not factor.args[0] or both.target is not torch.ops.specplug.linears_2.default:
        return None
    if gate.args[1] == factor.args[1] or both.args[5] != both.args[6]:
        return None
    return both, gate.args[1] == 0, name
