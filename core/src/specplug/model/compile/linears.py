"""Linear layers in a traced graph, rewritten as the operators that are fastest for a few rows.

Gated linear units (arXiv:2002.05202) become one operator: the rows between its linears, several times as wide as the residual
stream, are then never written.
"""

from __future__ import annotations

import operator
import sys
from collections import defaultdict
from typing import Any

import attrs
import torch
from torch import fx

from specplug.model.load.packing import PANEL


def use_own_linears(graph: fx.Graph) -> None:
    """Matmuls with a weight become our own linear operator, as packed ones on a CPU are."""
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
            states = states.args[0]  # so that linears of the same rows have the same input node
        size = weight.meta["val"].shape[1]
        with graph.inserting_before(node):
            linear = graph.call_function(torch.ops.specplug.linear.default, (states, weight.args[0], bias, int(size)))
            linear.meta["val"] = states.meta["val"].new_empty(*states.meta["val"].shape[:-1], int(size))
            flat = graph.call_function(aten.reshape.default, (linear, [-1, int(size)]))
            flat.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(flat)
        graph.erase_node(node)


def join_linears(graph: fx.Graph) -> None:
    """Linears of the same rows (query, key and value; gate and up) become one operator."""
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


_aten = torch.ops.aten
_operations = torch.ops.specplug


@attrs.frozen
class _Gated:
    """A gated linear unit: the node with both linears, whether the first is the gate, and the gate's activation."""

    linears: Any
    gate_first: bool
    activation: str


def fuse_gates(graph: fx.Graph) -> None:
    """Two linears of the same rows, one activated and multiplied with the other, become one operator.

    They may have a weight each, or the halves of one.
    """
    from specplug.native.operators import ACTIVATIONS

    for node in list(graph.nodes):
        found = _gated(node)
        if found is None:
            continue
        with graph.inserting_before(node):
            states, branches, size = _branches(graph, found.linears)
            gate, up = branches if found.gate_first else branches[::-1]
            arguments = (states, gate[0], up[0], gate[1], up[1], size, ACTIVATIONS[found.activation])
            gated = graph.call_function(_operations.gated_linears.default, arguments)
        gated.meta = dict(node.meta)
        node.replace_all_uses_with(gated)
        graph.erase_node(node)


def _gated(node: fx.Node) -> _Gated | None:
    """Recognises activation(gate) * up, where neither has another use."""
    if node.target is not _aten.mul.Tensor:
        return None
    factors: Any = node.args
    for activated, up in (factors, factors[::-1]):
        if not (_is_used_once(activated) and _is_used_once(up)):
            continue
        name = _activation(activated)
        gate: Any = activated.args[0] if name else None
        if not (name and _is_used_once(gate) and gate.target is operator.getitem and up.target is operator.getitem):
            continue
        linears = gate.args[0]
        if linears is up.args[0] and gate.args[1] != up.args[1] and _are_alike(linears):
            return _Gated(linears, gate.args[1] == 0, name)
    return None


def _is_used_once(node: Any) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1


def _activation(node: fx.Node) -> str | None:
    if node.target is _aten.silu.default:
        return "silu"
    if node.target is _aten.gelu.default and node.kwargs.get("approximate") == "tanh":
        return "gelu_tanh"
    return None


def _are_alike(linears: Any) -> bool:
    """Whether these are two linears of one size."""
    if linears.target is _operations.linears_2.default:
        return linears.args[5] == linears.args[6]
    if linears.target is not _aten.split.Tensor:
        return False
    whole, size, dim = (*linears.args, 0)[:3]
    return (
        whole.target is _operations.linear.default
        and _is_used_once(whole)
        and dim in (-1, whole.meta["val"].dim() - 1)
        and whole.args[3] == 2 * size
        and size % PANEL == 0
    )


def _branches(graph: fx.Graph, linears: Any) -> tuple[Any, list[tuple[Any, Any]], int]:
    """The rows, each linear's weight and bias, and its size."""
    if linears.target is _operations.linears_2.default:
        states, one, other, bias, other_bias, size, _ = linears.args
        return states, [(one, bias), (other, other_bias)], size
    whole, size = linears.args[:2]
    states, packed, bias, _ = whole.args
    weights = _halves(graph, packed, size // PANEL)
    return states, list(zip(weights, _halves(graph, bias, size) if bias else (None, None), strict=True)), size


def _halves(graph: fx.Graph, tensor: fx.Node, rows: int) -> list[fx.Node]:
    halves = []
    for begin, end in ((0, rows), (rows, sys.maxsize)):
        half = graph.call_function(_aten.slice.Tensor, (tensor, 0, begin, end))
        half.meta["val"] = tensor.meta["val"][begin:end]
        halves.append(half)
    return halves
