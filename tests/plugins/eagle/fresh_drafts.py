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
Path_ = tuple[int, ...]


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
    """A path fed alone: log-probabilities over target ids of what follows it, and what the next step needs."""

    log_probs: torch.Tensor
    feedback: torch.Tensor
    keys_values: KeyValues
    score: float


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
        self._dense = DenseAttend([], torch.zeros(0, dtype=torch.long), at)
        with torch.no_grad():
            result = self.head(
                self.head.embed(torch.tensor(list(tokens[begin + 1 :]))),
                self.head.fuse(features[begin:-1]),
                at,
                self._dense,
            )
            self._output, self._feedback = result.output, result.feedback

    def tree(self, length: int) -> FreshTree:
        """Drafts behind the first `length` tokens."""
        count = length - 1 - self.begin
        prefix = [(key[:, :count], value[:, :count]) for key, value in self._dense.new]
        root = Node(self._spread(self._output[count - 1]), self._feedback[count - 1], [], 0.0)
        return FreshTree(self, length, prefix, root)

    def _spread(self, output: torch.Tensor) -> torch.Tensor:
        """Log-probabilities over target ids; -inf for those the head does not know."""
        with torch.no_grad():
            own = self.head.logits(output[None])[0].double().log_softmax(dim=-1)
        if self.head.draft_to_target is None:
            return own
        spread = torch.full((self.head.spec.vocab_size,), float("-inf"), dtype=torch.float64)
        spread[self.head.draft_to_target] = own
        return spread

    def step(self, node: Node, prefix: KeyValues, keys_at: torch.Tensor, position: int, token: int) -> Node:
        """Feeds one more token behind a node."""
        before = [
            (torch.cat([key, *[own[layer][0] for own in node.keys_values]], 1), value)
            for layer, (key, value) in enumerate(prefix)
        ] if False else prefix
        attend = DenseAttend(before, keys_at, torch.tensor([position]))
        with torch.no_grad():
            result = self.head(self.head.embed(torch.tensor([token])), node.feedback[None], attend.queries_at, attend)
        return Node(self._spread(result.output[0]), result.feedback[0], attend.new, node.score + float(node.log_probs[token]))


class FreshTree:
    """The nodes behind one root, made when they are asked for."""

    def __init__(self, draft: FreshDraft, length: int, prefix: KeyValues, root: Node) -> None:
        self.draft = draft
        self.length = length
        self._prefix = prefix
        self._nodes: dict[Path_, Node] = {(): root}
