"""What a head drafts for one row, from a fresh prefill: no cache between steps, no batch, every path fed alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug_eagle.head import DraftHead
from support.heads import load_head
from support.reference import load_reference

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]
Tokens = tuple[int, ...]


def fresh_features(target: Path, boundaries: Sequence[int] | None, tokens: Sequence[int]) -> torch.Tensor:
    """[tokens, features] of a whole sequence by Transformers alone: inner boundaries, or the final normed state (None)."""
    model: Any = load_reference(target)
    last: list[torch.Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda module, args, out: last.append(out))
    with torch.no_grad():
        out = model(torch.tensor([list(tokens)]), output_hidden_states=True, use_cache=False)
    hook.remove()
    if boundaries is None:
        return out.hidden_states[-1][0]
    leaving = last[0] if isinstance(last[0], torch.Tensor) else last[0][0]
    states = [*out.hidden_states[:-1], leaving]
    return torch.cat([states[boundary][0] for boundary in boundaries], dim=-1)


class DenseAttend:
    """Attention over given keys and values and the new ones, spelled out with a mask of positions."""

    def __init__(self, before: KeyValues, keys_at: torch.Tensor, queries_at: torch.Tensor) -> None:
        self.before = before
        self.keys_at = torch.cat([keys_at, queries_at])
        self.queries_at = queries_at
        self.new: KeyValues = []

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        self.new.append((key, value))
        if self.before:
            key = torch.cat([self.before[layer][0], key], dim=1)
            value = torch.cat([self.before[layer][1], value], dim=1)
        group = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
        distance = self.queries_at[:, None] - self.keys_at[None, :]
        hidden = (distance < 0) | (distance >= (window or 1 << 30))
        scores = (query @ key.transpose(1, 2) * scaling).masked_fill(hidden, float("-inf"))
        return (scores.softmax(dim=-1) @ value).transpose(0, 1)


@attrs.frozen(eq=False)
class Node:
    """A path that was fed alone.

    Attributes:
        log_probs: of every target id as the next token; -inf for those that the head does not know.
        feedback: what the next step is fed.
        drafted: per layer the keys and values of the path's own entries.
        score: the path's cumulative log-probability.
    """

    log_probs: torch.Tensor
    feedback: torch.Tensor
    drafted: KeyValues
    score: float

    def best(self, count: int) -> list[int]:
        """The likeliest next tokens."""
        return self.log_probs.topk(count).indices.tolist()


class FreshDraft:
    """The head over one row, from entry `begin` on.

    Args:
        head: a draft head folder.
        target: a model folder.
        tokens: a row's ids, which may go on behind what was committed when it was drafted for.
        begin: the first pair that the head has.
    """

    def __init__(self, head: Path, target: Path, tokens: Sequence[int], begin: int) -> None:
        self.head: DraftHead
        self.head, boundaries = load_head(head, target)
        self.begin = begin
        features = fresh_features(target, None if self.head.spec.uses_final_state else boundaries, tokens)
        at = torch.arange(begin, len(tokens) - 1)
        dense = DenseAttend([], at[:0], at)
        with torch.no_grad():
            fused = self.head.fuse(features[begin:-1])
            self._result = self.head(self.head.embed(torch.tensor(list(tokens[begin + 1 :]))), fused, at, dense)
        self._stored = dense.new

    def tree(self, length: int) -> FreshTree:
        """Drafts behind the first `length` tokens."""
        count = length - 1 - self.begin
        stored = [(key[:, :count], value[:, :count]) for key, value in self._stored]
        nothing = [(key[:, :0], value[:, :0]) for key, value in self._stored]
        root = Node(self.spread(self._result.output[count - 1]), self._result.feedback[count - 1], nothing, 0.0)
        return FreshTree(self, length, stored, root)

    def spread(self, output: torch.Tensor) -> torch.Tensor:
        """Log-probabilities over target ids."""
        with torch.no_grad():
            own = self.head.logits(output[None])[0].double().log_softmax(dim=-1)
        if self.head.draft_to_target is None:
            return own
        spread = torch.full((self.head.spec.vocab_size,), float("-inf"), dtype=torch.float64)
        spread[self.head.draft_to_target] = own
        return spread


class FreshTree:
    """The paths behind one root, each made alone when it is asked for."""

    def __init__(self, draft: FreshDraft, length: int, stored: KeyValues, root: Node) -> None:
        self._draft = draft
        self._length = length
        self._stored = stored
        self._nodes: dict[Tokens, Node] = {(): root}

    def node(self, path: Tokens) -> Node:
        """The node that a path of tokens leads to."""
        if path not in self._nodes:
            self._nodes[path] = self._step(self.node(path[:-1]), len(path), path[-1])
        return self._nodes[path]

    def score(self, path: Tokens) -> float:
        """A path's cumulative log-probability; its last token need not be fed for that."""
        parent = self.node(path[:-1])
        return parent.score + float(parent.log_probs[path[-1]])

    def _step(self, parent: Node, depth: int, token: int) -> Node:
        head, position = self._draft.head, self._length + depth - 2
        before = [
            (torch.cat([stored[0], own[0]], dim=1), torch.cat([stored[1], own[1]], dim=1))
            for stored, own in zip(self._stored, parent.drafted, strict=True)
        ]
        attend = DenseAttend(before, torch.arange(self._draft.begin, position), torch.tensor([position]))
        with torch.no_grad():
            result = head(head.embed(torch.tensor([token])), parent.feedback[None], attend.queries_at, attend)
        drafted = [
            (torch.cat([own[0], new[0]], dim=1), torch.cat([own[1], new[1]], dim=1))
            for own, new in zip(parent.drafted, attend.new, strict=True)
        ]
        score = parent.score + float(parent.log_probs[token])
        return Node(self._draft.spread(result.output[0]), result.feedback[0], drafted, score)


def static_tree(tree: FreshTree, shape: Sequence[Tokens], max_nodes: int, max_depth: int) -> tuple[set[Tokens], float]:
    """The best nodes of a tree of sibling ranks, and the smallest gap between anything that was and was not chosen."""
    paths: dict[Tokens, Tokens] = {(): ()}
    gap = float("inf")
    for ranks in sorted(shape, key=lambda ranks: (len(ranks), ranks)):
        if len(ranks) > max_depth:
            continue
        parent = paths[ranks[:-1]]
        values, ids = tree.node(parent).log_probs.topk(ranks[-1] + 2)
        gap = min(gap, float((values[:-1] - values[1:]).min()))
        paths[ranks] = (*parent, int(ids[ranks[-1]]))
    del paths[()]
    return _best(tree, list(paths.values()), max_nodes, gap)


def dynamic_tree(
    tree: FreshTree, depth: int, top_k: int, total_tokens: int, max_nodes: int, max_depth: int
) -> tuple[set[Tokens], float]:
    """EAGLE-2's expansion and rerank, node by node; returns as `static_tree` does."""
    gap = float("inf")

    def children(parent: Tokens) -> list[Tokens]:
        nonlocal gap
        values, ids = tree.node(parent).log_probs.topk(top_k + 1)
        gap = min(gap, float(values[-2] - values[-1]))
        return [(*parent, token) for token in ids[:-1].tolist()]

    level = children(())
    scored = list(level)
    for _ in range(min(depth, max_depth - 1)):
        offered = [child for parent in level for child in children(parent)]
        scored += offered
        level, gap = _best_list(tree, offered, top_k, gap)
    return _best(tree, scored, min(max_nodes, total_tokens - 1), gap)


def _best_list(tree: FreshTree, paths: list[Tokens], count: int, gap: float) -> tuple[list[Tokens], float]:
    ordered = sorted(paths, key=tree.score, reverse=True)
    if len(ordered) > count:
        gap = min(gap, tree.score(ordered[count - 1]) - tree.score(ordered[count]))
    return ordered[:count], gap


def _best(tree: FreshTree, paths: list[Tokens], count: int, gap: float) -> tuple[set[Tokens], float]:
    chosen, gap = _best_list(tree, paths, count, gap)
    return set(chosen), gap
