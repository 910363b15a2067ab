"""Sample and match: draw the target's token at every node, then follow the draft while it agrees.

The target draws x at the root. If a child of the root is x, x is accepted and the walk continues there; otherwise x is
emitted and the walk ends. The emitted tokens are the target's own draws, so the rule is lossless for any draft that does not
depend on these draws. For a deterministic set of candidates no rule accepts more: the acceptance probability is the target's
total probability of the candidates. Greedy decoding is the same walk with argmax.

Seeded rows always use this rule, with noise keyed by (seed, output index). The draw at an output index then depends only on
the request, so the output is that of plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from specplug.contract.types import Proposal
from specplug.contract.verification import TargetDistributions, VerificationBatch, VerificationRow
from specplug.sampling.randomness import EngineRandomness, exponential_noise, race
from specplug.sampling.workspace import Workspace
from specplug.speculation.draft import depths_of


def sample_and_match(
    rows: Sequence[int],
    batch: VerificationBatch,
    proposal: Proposal,
    target: TargetDistributions,
    randomness: EngineRandomness,
    workspace: Workspace | None = None,
) -> list[tuple[int, list[int], int]]:
    """Verifies the given rows; returns (row, accepted path, next token) for each."""
    drawn = _draw(rows, batch, proposal, target, randomness, workspace)
    results = []
    for row in rows:
        tokens = cast(Sequence[int], proposal.tokens[row])
        parents = proposal.parents[row] if proposal.parents is not None else None
        results.append((row, *follow(tokens, parents, drawn[row])))
    return results


def follow(tokens: Sequence[int], parents: Sequence[int] | None, draws: Sequence[int]) -> tuple[list[int], int]:
    """Follows a draft along the target's own tokens.

    Args:
        tokens: the draft's nodes.
        parents: of each node, -1 for the root; None for a chain.
        draws: the target's token at the root and at each node.

    Returns:
        (the accepted path, the next token).
    """
    path: list[int] = []
    if parents is None:
        depth = 0
        while depth < len(tokens) and tokens[depth] == draws[depth]:
            path.append(depth)
            depth += 1
        return path, draws[depth]
    node = -1
    children: dict[tuple[int, int], int] = {}
    for child in reversed(range(len(tokens))):
        children[parents[child], tokens[child]] = child
    while (child_or_none := children.get((node, draws[node + 1]))) is not None:
        node = child_or_none
        path.append(node)
    return path, draws[node + 1]


def _draw(
    rows: Sequence[int],
    batch: VerificationBatch,
    proposal: Proposal,
    target: TargetDistributions,
    randomness: EngineRandomness,
    workspace: Workspace | None,
) -> dict[int, list[int]]:
    """The target's draw at every entry of each row."""
    greedy = [row for row in rows if batch.rows[row].sampling.greedy]
    sampled = [row for row in rows if not batch.rows[row].sampling.greedy]
    drawn: dict[int, list[int]] = {}
    offsets = target.offsets
    if greedy:
        _scatter(
            drawn, greedy, offsets, target.argmax([e for row in greedy for e in range(offsets[row], offsets[row + 1])])
        )
    if sampled:
        probs = target.probs([e for row in sampled for e in range(offsets[row], offsets[row + 1])])
        keys = [
            (batch.rows[row].randomness, index)
            for row in sampled
            for index in _output_indices(batch.rows[row], row, proposal)
        ]
        out = None if workspace is None else workspace.noise(len(keys))
        noise = exponential_noise(keys, probs.shape[-1], randomness, out)
        _scatter(drawn, sampled, offsets, race(probs, noise).tolist())
    return drawn


def _output_indices(entry: VerificationRow, row: int, proposal: Proposal) -> list[int]:
    """The output index of the token drawn at each entry of a row: root first, then the nodes."""
    first = entry.output_index
    parents = proposal.parents[row] if proposal.parents is not None else None
    if parents is None:
        return list(range(first, first + len(proposal.tokens[row]) + 1))
    return [first, *(first + depth for depth in depths_of(parents))]


def _scatter(drawn: dict[int, list[int]], rows: Sequence[int], offsets: Sequence[int], tokens: list[int]) -> None:
    start = 0
    for row in rows:
        count = offsets[row + 1] - offsets[row]
        drawn[row] = tokens[start : start + count]
        start += count
