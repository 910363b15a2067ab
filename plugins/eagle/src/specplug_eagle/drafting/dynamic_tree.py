"""EAGLE-2's dynamic tree (Li et al. 2406.16858): expand the most likely nodes, then verify the most likely of all.

A node's score is the cumulative log-probability of its path. Each level expands the `top_k` best nodes of the level before into
their `top_k` most likely children; the best of all scored nodes are verified. Children are not sampled, so the tree is
deterministic, does not depend on the temperature, and is verified by matching.
"""

from __future__ import annotations

import attrs
import torch

from specplug import ForwardRow, TreeMask
from specplug_eagle.drafting.runner import HeadRunner, Roots
from specplug_eagle.drafting.tree_draft import TreeDraft


@attrs.frozen
class DynamicTree:
    """The tree's limits, in the authors' terms.

    Attributes:
        depth: draft forwards after the first level.
        top_k: nodes expanded per level, and children of each.
        total_tokens: nodes to verify, the root included.
    """

    depth: int
    top_k: int
    total_tokens: int

    @property
    def max_nodes(self) -> int:
        """The most nodes of a draft."""
        return self.total_tokens - 1

    @property
    def max_depth(self) -> int:
        """The depth of a draft."""
        return self.depth + 1

    @property
    def width(self) -> int:
        """Nodes of a row that are expanded at once."""
        return self.top_k

    @property
    def num_inner(self) -> int:
        """Nodes that are expanded, the root included."""
        return 1 + self.depth * self.top_k

    @property
    def scratch(self) -> int:
        """KV entries that drafting writes."""
        return self.depth * self.top_k

    @property
    def samples(self) -> bool:
        """Whether nodes may be sampled."""
        return False

    def draft(self, roots: Roots, runner: HeadRunner) -> list[TreeDraft]:
        """Drafts one tree per row, with one head forward per level for all rows."""
        limits = [row.budget.max_depth for row in roots.rows]
        growth = _Growth.plant(roots, runner, self.top_k, min(self.depth, max(limits) - 1))
        for level in range(1, growth.levels + 1):
            growth.expand(level, [index for index, limit in enumerate(limits) if limit > level])
        return growth.harvest(min(self.max_nodes, growth.scores.shape[1]))


@attrs.define(eq=False)
class _Growth:
    """The growing trees of all rows. M is the most nodes that are scored; unused ones score -inf.

    Attributes:
        scores: float32 [R, M]; node order is the order of creation.
        tokens: int64 [R, M], target ids.
        parents: int64 [R, M].
        members: the A rows that still grow.
        beam: int64 [A, k], the nodes to expand next.
        hidden: [A, k, hidden], the feedback of their parents.
        visible: bool [A, k, entries], the mask over drafted KV entries: a node attends to its ancestors.
    """

    roots: Roots
    runner: HeadRunner
    width: int
    levels: int
    scores: torch.Tensor
    tokens: torch.Tensor
    parents: torch.Tensor
    members: list[int]
    beam: torch.Tensor
    hidden: torch.Tensor
    visible: torch.Tensor

    @classmethod
    def plant(cls, roots: Roots, runner: HeadRunner, top_k: int, levels: int) -> _Growth:
        """The first level: the root's most likely children."""
        log_probs = runner.log_probs(roots.output)
        width = min(top_k, log_probs.shape[-1])
        best = log_probs.topk(width, dim=-1)
        rows, device = len(roots.rows), log_probs.device
        size = width + levels * width * width
        scores = torch.full((rows, size), float("-inf"), device=device, dtype=torch.float32)
        tokens = torch.zeros(rows, size, dtype=torch.long, device=device)
        parents = torch.full((rows, size), -1, dtype=torch.long, device=device)
        scores[:, :width] = best.values
        tokens[:, :width] = runner.target_ids(best.indices)
        return cls(
            roots=roots,
            runner=runner,
            width=width,
            levels=levels,
            scores=scores,
            tokens=tokens,
            parents=parents,
            members=list(range(rows)),
            beam=torch.arange(width, device=device, dtype=torch.long).expand(rows, width),
            hidden=roots.hidden[:, None].expand(-1, width, -1),
            visible=torch.zeros(rows, width, 0, dtype=torch.bool, device="cpu"),
        )

    def expand(self, level: int, members: list[int]) -> None:
        """Runs the head over the beam of every row that still grows, scores the children, and chooses the next beam."""
        if len(members) < len(self.members):
            kept = [self.members.index(member) for member in members]
            self.members = members
            self.visible = self.visible[kept]
            at = torch.tensor(kept, device=self.beam.device, dtype=torch.long)
            self.beam, self.hidden = self.beam[at], self.hidden[at]
        width, count = self.width, len(members)
        entries = torch.eye(width, dtype=torch.bool, device="cpu").expand(count, -1, -1)
        self.visible = torch.cat([self.visible, entries], dim=-1)
        rows = [self._row(index, member, level) for index, member in enumerate(members)]
        place = torch.tensor(members, device=self.beam.device, dtype=torch.long)[:, None]
        result = self.runner.run(rows, self.tokens[place, self.beam].flatten(), self.hidden.flatten(0, 1))
        best = self.runner.log_probs(result.output).topk(width, dim=-1)
        scores = self.scores[place, self.beam].flatten()[:, None] + best.values
        first = width + (level - 1) * width * width
        span = slice(first, first + width * width)
        self.scores[place[:, 0], span] = scores.view(count, -1)
        self.tokens[place[:, 0], span] = self.runner.target_ids(best.indices).view(count, -1)
        self.parents[place[:, 0], span] = self.beam.repeat_interleave(width, dim=1)
        chosen = scores.view(count, -1).topk(width, dim=-1).indices
        beams = chosen // width
        self.beam = chosen + first
        self.hidden = result.feedback.view(count, width, -1).gather(
            1, beams[..., None].expand(-1, -1, result.feedback.shape[-1])
        )
        self.visible = self.visible[torch.arange(count, dtype=torch.long, device="cpu")[:, None], beams.cpu()]

    def _row(self, index: int, member: int, level: int) -> ForwardRow:
        row, start = self.roots.rows[member], self.roots.start(member)
        assert row.table is not None, "core gives every row its blocks"
        positions = [start + depth for depth in range(level) for _ in range(self.width)]
        return ForwardRow(
            tokens=[0] * self.width,
            start=start + (level - 1) * self.width,
            table=row.table,
            tree=TreeMask(start, self.visible[index], positions),
            first=self.roots.first[member],
        )

    def harvest(self, most: int) -> list[TreeDraft]:
        """The best nodes within each row's budget. Of equal scores the earlier node is taken, so a parent before its child."""
        order = self.scores.sort(dim=-1, descending=True, stable=True).indices[:, :most]
        tables = (order, *(table.gather(1, order) for table in (self.scores, self.tokens, self.parents)))
        columns = [table.tolist() for table in tables]
        drafts = []
        for row, nodes, scores, tokens, parents in zip(self.roots.rows, *columns, strict=True):
            best = range(min(len(nodes), row.budget.max_nodes))
            kept = sorted((place for place in best if scores[place] > float("-inf")), key=lambda place: nodes[place])
            index = {-1: -1, **{nodes[place]: number for number, place in enumerate(kept)}}
            drafts.append(
                TreeDraft(
                    tokens=[tokens[place] for place in kept],
                    parents=[index[parents[place]] for place in kept],
                    scores=[scores[place] for place in kept],
                )
            )
        return drafts
