"""Recursive rejection for trees whose siblings were drawn without replacement (RSD, Jeon et al. 2402.14160).

At a node with target distribution p and children x_1, x_2, … drawn in that order from q without replacement: R_1 = p and
Q_1 = q; child j is accepted with probability min(1, R_j(x_j) / Q_j(x_j)), and the walk continues there; otherwise
R_{j+1} = norm((R_j - Q_j)+) and Q_{j+1} = norm(Q_j without x_j). After the last child the next token is drawn from R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from specplug.contract.types import Proposal
from specplug.contract.verification import TargetDistributions, VerificationBatch
from specplug.model.device import to_device
from specplug.sampling.randomness import EngineRandomness, Stream
from specplug.speculation.verification.distributions import draft_distributions, sample_residual


class _Walk:
    """The state of the walk through one row's tree."""

    def __init__(self, row: int, lane: int, parents: Sequence[int], tokens: Sequence[int]) -> None:
        self.row = row
        self.lane = lane
        self.tokens = tokens
        self.path: list[int] = []
        self.children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents):
            self.children.setdefault(parent, []).append(node)
        self.pending = list(self.children.get(-1, ()))

    @property
    def node(self) -> int:
        """The last accepted node, -1 at the root."""
        return self.path[-1] if self.path else -1

    def accept(self, child: int) -> None:
        """Moves to a child."""
        self.path.append(child)
        self.pending = list(self.children.get(child, ()))


def recursive_rejection(
    rows: Sequence[int],
    batch: VerificationBatch,
    proposal: Proposal,
    target: TargetDistributions,
    randomness: EngineRandomness,
) -> list[tuple[int, list[int], int]]:
    """Verifies sampled trees; each round tries one child of every row that has one left."""
    assert proposal.parents is not None
    offsets = target.offsets
    entries = [entry for row in rows for entry in range(offsets[row], offsets[row + 1])]
    p_all = target.probs(entries)
    vocabulary = p_all.shape[-1]
    first_entry: list[int] = []
    count = 0
    for row in rows:
        first_entry.append(count)
        count += offsets[row + 1] - offsets[row]
    drafts = [draft_distributions(proposal, row, vocabulary) for row in rows]
    walks = [
        _Walk(row, lane, proposal.parents[row] or (), cast(Sequence[int], proposal.tokens[row]))
        for lane, row in enumerate(rows)
    ]
    remaining = p_all[to_device(first_entry, p_all.device)]  # R, [rows, V]
    proposed = torch.zeros_like(remaining)  # Q, [rows, V]
    for walk in walks:
        _enter(walk, proposed, drafts)
    while active := [walk for walk in walks if walk.pending]:
        children = [walk.pending.pop(0) for walk in active]
        chosen = [walk.tokens[child] for walk, child in zip(active, children, strict=True)]
        lanes, tokens = to_device([*(walk.lane for walk in active), *chosen], p_all.device).view(2, -1)
        ours, theirs = remaining[lanes], proposed[lanes]
        r_token = ours.gather(1, tokens[:, None])[:, 0]
        q_token = theirs.gather(1, tokens[:, None])[:, 0]
        coins = torch.rand(
            len(active), generator=randomness.generator(Stream.ACCEPTANCE), device=p_all.device, dtype=torch.float32
        )
        accepts = (coins * q_token < r_token).tolist()
        residual = (ours - theirs).clamp_min_(0)
        total = residual.sum(dim=-1, keepdim=True)
        remaining[lanes] = torch.where(total > 0, residual / total, ours)
        rest = theirs.scatter(1, tokens[:, None], 0.0)
        proposed[lanes] = rest / rest.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
        for walk, child, accepted in zip(active, children, accepts, strict=True):
            if accepted:
                walk.accept(child)
                remaining[walk.lane] = p_all[first_entry[walk.lane] + 1 + child]
                _enter(walk, proposed, drafts)
    at_node = [first_entry[walk.lane] + 1 + walk.node for walk in walks]
    following = sample_residual(remaining, p_all[to_device(at_node, p_all.device)], randomness).tolist()
    return [(walk.row, walk.path, token) for walk, token in zip(walks, following, strict=True)]


def _enter(walk: _Walk, proposed: torch.Tensor, drafts: list[torch.Tensor]) -> None:
    """Sets the row's Q to the distribution its pending children were drawn from."""
    if walk.pending:
        proposed[walk.lane] = drafts[walk.lane][walk.pending[0]]
