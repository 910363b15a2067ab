"""RoPE in a traced graph, fused into the attention that follows it.

Models rotate queries and keys by operations of their own, layer by layer, and a compiler that fuses these computes the cosines
of every position again for every head of every layer. Attention that is given the cosines rotates what it reads anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

_aten = torch.ops.aten


@attrs.frozen
class _Rotated:
    """What is rotated, and by which angles: states [..., tokens, dim], cosines and sines [..., tokens, rotated dim]."""

    states: fx.Node
    cosines: fx.Node
    sines: fx.Node


def fuse_rope(graph: fx.Graph) -> None:
    """Attention over queries and keys that are rotated by the same angles becomes one operator.

    Only the first elements of heads may be rotated. Other forms stay as they are: rotation of neighbouring pairs, for example.
    """
    for node in list(graph.nodes):
        if node.target is not torch.ops.specplug.attend.default:
            continue
        query, key = (_rotated(argument) for argument in node.args[:2])
        if query is None or key is None or (query.cosines, query.sines) != (key.cosines, key.sines):
            continue
        with graph.inserting_before(node):
            states = [_four_dimensional(graph, rotated.states) for rotated in (query, key)]
            arguments = (*states, *node.args[2:], query.cosines, query.sines)
            attended = graph.call_function(torch.ops.specplug.attend_rope.default, arguments)
        attended.meta = dict(node.meta)
        node.replace_all_uses_with(attended)
        graph.erase_node(node)


def _rotated(node: Any) -> _Rotated | None:
    """Recognises heads that are rotated as a whole, or whose first elements are, followed by the others unchanged."""
    if _is(node, _aten.unsqueeze.default) and node.args[1] == 0:
        node = node.args[0]
    if not _is(node, _aten.cat.default) or len(node.args[0]) != 2 or not _is_last(node, node.args[1:]):
        return _rotated_whole(node)
    first, rest = node.args[0]
    rotated = _rotated_whole(first)
    if rotated is None or not _is(rest, _aten.slice.Tensor):
        return None
    heads, part = rest.args[0], rotated.states
    dim = part.meta["val"].shape[-1]
    if _elements(rest) != (dim, heads.meta["val"].shape[-1]):
        return None
    is_all = _is(part, _aten.alias.default) and part.args[0] is heads  # then nothing follows
    is_first = _is(part, _aten.slice.Tensor) and part.args[0] is heads and _elements(part) == (0, dim)
    return attrs.evolve(rotated, states=heads) if is_all or is_first else None


def _rotated_whole(node: Any) -> _Rotated | None:
    """Recognises x * cosines + cat(-x[half:], x[:half]) * sines."""
    if not _is(node, _aten.add.Tensor) or node.kwargs:
        return None
    for straight, crossed in (node.args[:2], node.args[1::-1]):
        if not (_is(straight, _aten.mul.Tensor) and _is(crossed, _aten.mul.Tensor)):
            continue
        for swapped, sines in (crossed.args, crossed.args[::-1]):
            states = _swapped(swapped)
            if states is None or states not in straight.args:
                continue
            cosines = straight.args[1] if straight.args[0] is states else straight.args[0]
            if _are_cosines(cosines, states) and _are_cosines(sines, states):
                return _Rotated(states, cosines, sines)
    return None


def _swapped(node: Any) -> fx.Node | None:
    """The x of cat(-x[half:], x[:half])."""
    if not _is(node, _aten.cat.default) or len(node.args[0]) != 2 or not _is_last(node, node.args[1:]):
        return None
    negated, first = node.args[0]
    if not _is(negated, _aten.neg.default):
        return None
    (one, low), (other, high) = _part(first), _part(negated.args[0])
    if one is None or one is not other or (low, high) != (0, 1):
        return None
    return one


def _part(node: Any) -> tuple[fx.Node | None, int]:
    """For half the elements of a last dimension: of which tensor, and which half."""
    if _is(node, _aten.slice.Tensor):
        size = node.args[0].meta["val"].shape[-1]
        for half in (0, 1):
            if size % 2 == 0 and _elements(node) == (half * size // 2, (half + 1) * size // 2):
                return node.args[0], half
    if _is(node, operator.getitem) and _is(node.args[0], _aten.split.Tensor):
        split, index = node.args
        states, size = split.args[:2]
        if _is_last(states, split.args[2:]) and size * 2 == states.meta["val"].shape[-1]:
            return states, index
    return None, 0


def _elements(part: fx.Node) -> tuple[int, int] | None:
    """The range of the last dimension's elements that a slice takes: begin and end."""
    if len(part.args) != 4 or not _is_last(part, part.args[1:2]):
        return None
    states, _, begin, end = part.args
    if not (isinstance(states, fx.Node) and isinstance(begin, int) and isinstance(end, int)):
        return None
    return begin, min(end, int(states.meta["val"].shape[-1]))


def _is_last(node: fx.Node, dims: Sequence[Any]) -> bool:
    """Whether a dimension (by default the first) is a tensor's last."""
    dim = dims[0] if dims else 0
    return dim in (-1, node.meta["val"].dim() - 1)


def _are_cosines(node: Any, states: fx.Node) -> bool:
    """Whether a tensor has one row for each token, the same for every head."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    own, shape = node.meta["val"], states.meta["val"].shape
    return (
        own.dtype == states.meta["val"].dtype
        and own.dim() >= 2
        and all(size == 1 for size in own.shape[:-2])
        and own.shape[-1] == shape[-1]
        and statically_known_true(own.shape[-2] == shape[-2])
    )


def _four_dimensional(graph: fx.Graph, states: fx.Node) -> fx.Node:
    if states.meta["val"].dim() == 4:
        return states
    lifted = graph.call_function(_aten.unsqueeze.default, (states, 0))
    lifted.meta["val"] = states.meta["val"].unsqueeze(0)
    return lifted


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target
