"""Chains: drafts one token after the other, within the budget and while drafting is worthwhile."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import attrs
import torch

from specplug import Budget, DraftDistributions, ForwardRow, argmax_with_prob, process, sample
from specplug_eagle.drafting.runner import HeadRunner, Roots
from specplug_eagle.drafting.tree_draft import TreeDraft


@attrs.frozen(eq=False)
class _Level:
    """The tokens of one depth.

    Attributes:
        members: the M rows that have a token at this depth.
        tokens: int64 [M], target ids.
        scores: float32 [M], cumulative log-probabilities; meaningless for sampled tokens.
        probs: per row the distribution that its token was sampled from.
    """

    members: list[int]
    tokens: torch.Tensor
    scores: torch.Tensor
    probs: dict[int, torch.Tensor]


class Chain:
    """Chains as the shape of drafts.

    Args:
        length: the most tokens.
        sampled: whether tokens are sampled for rows that gain by it; else they are the most likely ones.
    """

    def __init__(self, length: int, *, sampled: bool) -> None:
        self.max_nodes = self.max_depth = length
        self.samples = sampled

    @property
    def width(self) -> int:
        """Nodes of a row that are drafted at once."""
        return 1

    @property
    def num_inner(self) -> int:
        """Nodes that have children, the root included."""
        return self.max_nodes

    @property
    def scratch(self) -> int:
        """KV entries that drafting writes."""
        return self.max_nodes - 1

    def draft(self, roots: Roots, runner: HeadRunner) -> list[TreeDraft]:
        """Drafts one chain per row, with one head forward per level for all rows that continue."""
        sampled = {index for index, row in enumerate(roots.rows) if self.samples and row.gains_by_sampling}
        members, output, hidden = list(range(len(roots.rows))), roots.output, roots.hidden
        before = torch.zeros(len(members), device=output.device, dtype=torch.float32)
        levels: list[_Level] = []
        while True:
            level = _draw(members, output, before, roots, runner, sampled)
            levels.append(level)
            going = [m for m in members if _most_tokens(roots, m) > len(levels)]
            going = _promising(going, level, roots, sampled)
            if not going:
                return _finish(levels, roots, runner, sampled)
            tokens, before = level.tokens, level.scores
            if len(going) < len(members):
                kept = torch.tensor([members.index(member) for member in going], device=output.device, dtype=torch.long)
                tokens, before, hidden = tokens[kept], before[kept], hidden[kept]
                members = going
            rows = [_row(roots, member, len(levels) - 1) for member in members]
            result = runner.run(rows, tokens, hidden)
            output, hidden = result.output, result.feedback


def _most_tokens(roots: Roots, index: int) -> int:
    budget = roots.rows[index].budget
    return min(budget.max_nodes, budget.max_depth)


def _row(roots: Roots, index: int, drafted: int) -> ForwardRow:
    table = roots.rows[index].table
    assert table is not None, "core gives every row its blocks"
    return ForwardRow([0], roots.start(index) + drafted, table, first=roots.first[index])


def _draw(
    members: list[int],
    output: torch.Tensor,
    before: torch.Tensor,
    roots: Roots,
    runner: HeadRunner,
    sampled: set[int],
) -> _Level:
    """The next token of every row; `output` is [members, hidden], `before` the scores so far."""
    logits = runner.head.logits(output)
    ids, chances = argmax_with_prob(logits)
    probs: dict[int, torch.Tensor] = {}
    if drawing := [member for member in members if member in sampled]:
        at = torch.tensor([members.index(member) for member in drawing], device=output.device, dtype=torch.long)
        rows = [roots.rows[member] for member in drawing]
        values = process(logits[at], [row.sampling for row in rows])
        ids = ids.index_copy(0, at, sample(values, [row.generator for row in rows], 1)[:, 0])
        probs = dict(zip(drawing, values, strict=True))
    return _Level(members, runner.target_ids(ids), before + chances.log(), probs)


def _promising(going: list[int], level: _Level, roots: Roots, sampled: set[int]) -> list[int]:
    """The rows whose chains are likely enough to go on. On a GPU all do: to look would make the host wait."""
    budgets = [roots.rows[member].budget for member in going]
    if level.scores.device.type != "cpu" or not any(budget.may_stop for budget in budgets):
        return going
    chances = dict(zip(level.members, level.scores.exp().tolist(), strict=True))
    known = [None if member in sampled else chances[member] for member in going]
    return list(itertools.compress(going, Budget.worth_extending(budgets, known)))


def _finish(levels: Sequence[_Level], roots: Roots, runner: HeadRunner, sampled: set[int]) -> list[TreeDraft]:
    """The drafts. Tokens and scores of all rows take one copy from the device each."""
    tokens = iter(torch.cat([level.tokens for level in levels]).tolist())
    scores = iter(torch.cat([level.scores for level in levels]).tolist())
    chains: list[list[int]] = [[] for _ in roots.rows]
    sums: list[list[float]] = [[] for _ in roots.rows]
    for level in levels:
        for member in level.members:
            chains[member].append(next(tokens))
            sums[member].append(next(scores))
    drafts = []
    for index, (chain, own) in enumerate(zip(chains, sums, strict=True)):
        probs = None
        if index in sampled:
            values = torch.stack([level.probs[index] for level in levels if index in level.probs])
            probs = DraftDistributions(values, token_ids=runner.reported_ids(values.device))
        drafts.append(TreeDraft(chain, scores=None if index in sampled else own, probs=probs))
    return drafts
