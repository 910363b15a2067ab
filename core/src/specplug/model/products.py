"""A traced graph's products with weights, rewritten as the operations that are fastest for a few rows."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx


def take_products(graph: fx.Graph) -> None:
    """Products with a weight become our own operation, as packed ones on a CPU are."""
    aten = torch.ops.aten
    views = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
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


def join_products(graph: fx.Graph) -> None:
    """Products of the same rows (query, key and value; gate and up) become one operation."""
    from specplug.native.operators import JOINED

    linear = torch.ops.specplug.linear.default
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is linear:
            groups[node.args[0]].append(node)
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
