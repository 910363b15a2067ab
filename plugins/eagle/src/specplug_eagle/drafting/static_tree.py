"""Trees of a fixed shape: children of given ranks at given nodes."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug import (
    ConfigurationError,
    DraftDistributions,
    ForwardRow,
    ProposalRow,
    TreeMask,
    process,
    sample,
)
from specplug_eagle.drafting.runner import HeadRunner, Roots
from specplug_eagle.drafting.tree_draft import TreeDraft, best_nodes, renumber


@attrs.frozen(eq=False)
class Level:
    """The inner nodes of one depth, and their children.

    Attributes:
        nodes: the inner nodes; the root is -1.
        parents: for each node its parent's index among the inner nodes of the level before.
        children: the nodes of the next depth.
        places: for each child, its parent's index in `nodes`.
        ranks: for each child, its rank among the siblings.
        visible: bool [nodes, drafted KV entries so far, its own included], the mask.
        depths: the depth of each of these entries; the first drafted depth is 0.
    """

    nodes: list[int]
    parents: list[int]
    children: list[int]
    places: torch.Tensor
    ranks: torch.Tensor
    visible: torch.Tensor
    depths: list[int]

    @property
    def fan(self) -> int:
        """The most children of a node."""
        return int(self.ranks.max()) + 1


class StaticTree:
    """A static tree as the shape of drafts.

    Args:
        paths: every node as its path of sibling ranks, in any order. Ancestors and earlier siblings must be among them.
        sampled: whether siblings are sampled for rows that gain by it; else they are the most likely tokens.

    Raises:
        ConfigurationError: the parent or an earlier sibling of a node is missing.
    """

    def __init__(self, paths: Sequence[tuple[int, ...]], *, sampled: bool) -> None:
        self.samples = sampled
        self.paths = sorted(set(paths), key=lambda path: (len(path), path))
        number = {(): -1, **{path: node for node, path in enumerate(self.paths)}}
        for path in self.paths:
            needed = path[:-1] if path[:-1] not in number else (*path[:-1], path[-1] - 1)
            if path[:-1] not in number or (path[-1] and needed not in number):
                raise ConfigurationError(
                    f"speculative_config: speculative_token_tree has the path {path} without {needed}; a node needs its "
                    "parent and its earlier siblings"
                )
        self.parents = [number[path[:-1]] for path in self.paths]
        self.depths = [len(path) for path in self.paths]
        self.levels = self._levels()

    @property
    def max_nodes(self) -> int:
        """The nodes of a full draft."""
        return len(self.paths)

    @property
    def max_depth(self) -> int:
        """The depth of a full draft."""
        return self.depths[-1]

    @property
    def width(self) -> int:
        """Nodes of a row whose children are drafted at once."""
        return max(len(level.nodes) for level in self.levels)

    @property
    def num_inner(self) -> int:
        """Nodes that have children, the root included."""
        return sum(len(level.nodes) for level in self.levels)

    @property
    def scratch(self) -> int:
        """KV entries that drafting writes."""
        return sum(len(level.nodes) for level in self.levels[1:])

    def _levels(self) -> list[Level]:
        levels: list[Level] = []
        inner, seen = [-1], torch.zeros(1, 0, dtype=torch.bool, device="cpu")
        parents, depths = [0], list[int]()
        while inner:
            children = [node for node, parent in enumerate(self.parents) if parent in inner]
            place = {node: index for index, node in enumerate(inner)}
            levels.append(
                Level(
                    nodes=inner,
                    parents=parents,
                    children=children,
                    places=torch.tensor(
                        [place[self.parents[node]] for node in children], dtype=torch.long, device="cpu"
                    ),
                    ranks=torch.tensor([self.paths[node][-1] for node in children], dtype=torch.long, device="cpu"),
                    visible=seen,
                    depths=depths,
                )
            )
            below = [node for node in children if node in self.parents]
            parents = [place[self.parents[node]] for node in below]
            seen = torch.cat([seen[parents], torch.eye(len(below), dtype=torch.bool, device="cpu")], dim=1)
            depths = depths + [len(levels) - 1] * len(below)
            inner = below
        return levels

    def draft(self, roots: Roots, runner: HeadRunner) -> list[TreeDraft]:
        """Drafts one tree per row, with one head forward per level for all rows."""
        drawing = _Drawing.of(self, roots, runner)
        output, hidden = roots.output[:, None], roots.hidden[:, None]
        members = list(range(len(roots.rows)))
        for depth, level in enumerate(self.levels):
            going = [index for index in members if roots.rows[index].budget.max_depth > depth]
            if not going:
                break
            if depth:
                kept = torch.tensor([members.index(index) for index in going], device=hidden.device, dtype=torch.long)
                parents = torch.tensor(level.parents, device=hidden.device, dtype=torch.long)
                fed = hidden[kept][:, parents]
                tokens = drawing.tokens[torch.tensor(going, device=hidden.device, dtype=torch.long)][:, level.nodes]
                rows = [self._row(roots, index, level) for index in going]
                result = runner.run(rows, tokens.flatten().clamp(min=0), fed.flatten(0, 1))
                shape = (len(going), len(level.nodes), -1)
                output, hidden = result.output.view(shape), result.feedback.view(shape)
            drawing.extend(going, level, output)
            members = going
        return drawing.finish()

    def _row(self, roots: Roots, index: int, level: Level) -> ForwardRow:
        row, start = roots.rows[index], roots.start(index)
        assert row.table is not None, "core gives every row its blocks"
        before = len(level.depths) - len(level.nodes)
        tree = TreeMask(start, level.visible, [start + depth for depth in level.depths])
        return ForwardRow([0] * len(level.nodes), start + before, row.table, tree, roots.first[index])

    def finish(self, row: ProposalRow, tokens: list[int], scores: list[float] | None) -> list[int]:
        """The drafted nodes of a row within its budget, ancestor-closed and ascending.

        Most likely nodes are dropped by score; sampled nodes by their place in the tree alone, since the sampled token must not
        decide.
        """
        drawn: list[int] = []
        present = {-1}
        for node, parent in enumerate(self.parents):
            if tokens[node] >= 0 and parent in present and self.depths[node] <= row.budget.max_depth:
                drawn.append(node)
                present.add(node)
        if scores is None:
            return drawn[: row.budget.max_nodes]
        return [drawn[place] for place in best_nodes([scores[node] for node in drawn], row.budget.max_nodes)]


@attrs.define(eq=False)
class _Drawing:
    """The trees of all rows.

    Attributes:
        tokens: int64 [R, nodes], target ids; -1 where a distribution had too few tokens.
        scores: float32 [R, nodes], cumulative log-probabilities.
        sampled: the rows whose nodes are sampled.
        distributions: per sampled row the distribution of each inner node, in level order.
    """

    tree: StaticTree
    roots: Roots
    runner: HeadRunner
    tokens: torch.Tensor
    scores: torch.Tensor
    sampled: list[int]
    distributions: dict[int, list[torch.Tensor]] = attrs.field(factory=dict)

    @classmethod
    def of(cls, tree: StaticTree, roots: Roots, runner: HeadRunner) -> _Drawing:
        """Trees without nodes."""
        shape, device = (len(roots.rows), tree.max_nodes), roots.output.device
        return cls(
            tree=tree,
            roots=roots,
            runner=runner,
            tokens=torch.full(shape, -1, dtype=torch.long, device=device),
            scores=torch.zeros(shape, device=device, dtype=torch.float32),
            sampled=[index for index, row in enumerate(roots.rows) if tree.samples and row.gains_by_sampling],
        )

    def extend(self, members: list[int], level: Level, output: torch.Tensor) -> None:
        """Drafts the children of a level's inner nodes; `output` is [members, inner nodes, hidden]."""
        device = output.device
        rows = torch.tensor(members, device=device, dtype=torch.long)[:, None]
        children = torch.tensor(level.children, device=device, dtype=torch.long)
        places, ranks = level.places.to(device), level.ranks.to(device)
        sampled = [index for index in members if index in self.sampled]
        if len(sampled) < len(members):
            log_probs = self.runner.log_probs(output)
            best = log_probs.topk(min(level.fan, log_probs.shape[-1]), dim=-1)
            known = ranks < best.indices.shape[-1]
            at = ranks.clamp(max=best.indices.shape[-1] - 1)
            tokens = self.runner.target_ids(best.indices[:, places, at])
            self.tokens[rows, children] = torch.where(known, tokens, -1)
            parents = torch.tensor(
                [self.tree.parents[node] for node in level.children], device=device, dtype=torch.long
            )
            before = (
                torch.zeros(1, device=device, dtype=torch.float32)
                if level.nodes == [-1]
                else self.scores[rows, parents]
            )
            self.scores[rows, children] = before + best.values[:, places, at]
        if sampled:
            self._sample(sampled, [members.index(index) for index in sampled], level, output)

    def _sample(self, sampled: list[int], at: list[int], level: Level, output: torch.Tensor) -> None:
        device, width = output.device, len(level.nodes)
        chosen = output[torch.tensor(at, device=device, dtype=torch.long)]
        logits = self.runner.head.logits(chosen.flatten(0, 1))
        rows = [self.roots.rows[index] for index in sampled for _ in range(width)]
        probs = process(logits, [row.sampling for row in rows])
        drawn = sample(probs, [row.generator for row in rows], min(level.fan, probs.shape[-1]))
        drawn = drawn.view(len(sampled), width, -1)
        ranks = level.ranks.clamp(max=drawn.shape[-1] - 1).to(device)
        ids = drawn[:, level.places.to(device), ranks]
        missing = (ids < 0) | (level.ranks.to(device) >= drawn.shape[-1])
        tokens = torch.where(missing, -1, self.runner.target_ids(ids.clamp(min=0)))
        place = torch.tensor(sampled, device=device, dtype=torch.long)[:, None]
        self.tokens[place, torch.tensor(level.children, device=device, dtype=torch.long)] = tokens
        for index, own in zip(sampled, probs.view(len(sampled), width, -1), strict=True):
            self.distributions.setdefault(index, []).extend(own)

    def finish(self) -> list[TreeDraft]:
        """The drafts. Tokens and scores of all rows take one copy from the device each."""
        tokens, scores = self.tokens.tolist(), self.scores.tolist()
        inner = [node for level in self.tree.levels for node in level.nodes]
        entry = {node: index for index, node in enumerate(inner)}
        parents = self.tree.parents
        drafts = []
        for index, row in enumerate(self.roots.rows):
            is_sampled = index in self.distributions
            kept = self.tree.finish(row, tokens[index], None if is_sampled else scores[index])
            probs = None
            if is_sampled and kept:
                values = torch.stack(self.distributions[index])
                probs = DraftDistributions(
                    values, [entry[parents[node]] for node in kept], self.runner.reported_ids(values.device)
                )
            drafts.append(
                TreeDraft(
                    tokens=[tokens[index][node] for node in kept],
                    parents=renumber(parents, kept),
                    scores=None if is_sampled else [scores[index][node] for node in kept],
                    probs=probs,
                )
            )
        return drafts
