"""Rejection sampling for chains whose tokens were drawn from reported distributions.

Notation: p_i is the target's distribution after i draft tokens, q_i the draft's, x_{i+1} ~ q_i the next draft token.
All rows are padded to the longest chain and verified together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import attrs
import torch

from specplug.contract.types import Proposal
from specplug.contract.verification import TargetDistributions, VerificationBatch
from specplug.model.device import to_device
from specplug.sampling.randomness import EngineRandomness, Stream
from specplug.speculation.verification.distributions import draft_distributions, sample_residual


@attrs.frozen(eq=False)
class _Chains:
    """R chains of at most K tokens.

    p: [R, K + 1, V]; q: [R, K + 1, V], zero from a chain's end on; ratio: [R, K] p_i(x) / q_i(x), zero after the end;
    lengths: [R].
    """

    p: torch.Tensor
    q: torch.Tensor
    ratio: torch.Tensor
    lengths: torch.Tensor


def standard(
    rows: Sequence[int],
    batch: VerificationBatch,
    proposal: Proposal,
    target: TargetDistributions,
    randomness: EngineRandomness,
) -> list[tuple[int, list[int], int]]:
    """Token-by-token rejection sampling (Leviathan et al. 2211.17192, Chen et al. 2302.01318).

    Token x_{i+1} is accepted with probability min(1, p_i(x) / q_i(x)); after the first rejection the next token is drawn
    from the residual norm((p_i - q_i)+).
    """
    chains = _gather(rows, proposal, target)
    uniform = _uniform(chains.ratio.shape, randomness)
    passed = (uniform < chains.ratio).long()
    kept = passed.cumprod(dim=1).sum(dim=1)
    return _finish(rows, chains, kept, torch.ones_like(chains.ratio[:, 0]), randomness)


def block(
    rows: Sequence[int],
    batch: VerificationBatch,
    proposal: Proposal,
    target: TargetDistributions,
    randomness: EngineRandomness,
) -> list[tuple[int, list[int], int]]:
    """Block verification (Sun et al. 2403.10444, algorithm 2): accepts the chain jointly, never fewer tokens than `standard`.

    With w_0 = 1 and w_i = min(1, w_{i-1} p(x_i) / q(x_i)), the first i tokens are kept for the largest i whose own coin
    comes up, with probability w_K at the end of the chain and s_i / (s_i + 1 - w_i) before it, where
    s_i = Σ_x (w_i p_i(x) - q_i(x))+. The next token is drawn from norm((w_i p_i - q_i)+).
    """
    chains = _gather(rows, proposal, target)
    longest = chains.ratio.shape[1]
    weights = [torch.ones_like(chains.ratio[:, 0])]
    for i in range(longest):
        weights.append((weights[-1] * chains.ratio[:, i]).clamp(max=1.0))
    weight = torch.stack(weights, dim=1)  # [R, K + 1]
    # position by position: all at once would need copies as large as p
    surpluses = [_surplus(weight[:, i], chains, i).sum(dim=-1) for i in range(longest + 1)]
    surplus = torch.stack(surpluses, dim=1)  # [R, K + 1]
    denominator = surplus + 1 - weight
    inner = torch.where(denominator > 0, surplus / denominator, torch.ones_like(surplus))
    position = torch.arange(longest + 1, device=weight.device, dtype=torch.long)[None, :]
    accept_prob = torch.where(position == chains.lengths[:, None], weight, inner)[:, 1:]
    coins = (_uniform(accept_prob.shape, randomness) < accept_prob) & (position[:, 1:] <= chains.lengths[:, None])
    kept = (coins * position[:, 1:]).amax(dim=1)
    return _finish(rows, chains, kept, weight.gather(1, kept[:, None])[:, 0], randomness)


def _surplus(weight: torch.Tensor, chains: _Chains, position: int) -> torch.Tensor:
    """(w p - q)+ at one position, [R, V]."""
    return torch.sub(weight[:, None] * chains.p[:, position], chains.q[:, position]).clamp_min_(0)


def _gather(rows: Sequence[int], proposal: Proposal, target: TargetDistributions) -> _Chains:
    counts = [len(proposal.tokens[row]) for row in rows]
    longest = max(counts)
    entries = [min(target.offsets[row] + i, target.offsets[row + 1] - 1) for row in rows for i in range(longest + 1)]
    p = target.probs(entries)
    vocabulary = p.shape[-1]
    p = p.view(len(rows), longest + 1, vocabulary)
    q = torch.zeros(len(rows), longest + 1, vocabulary, device=p.device, dtype=torch.float32)
    padded: list[list[int]] = []
    for lane, (row, count) in enumerate(zip(rows, counts, strict=True)):
        q[lane, :count] = draft_distributions(proposal, row, vocabulary)
        padded.append([*cast(Sequence[int], proposal.tokens[row]), *[0] * (longest - count)])
    tokens = to_device(list(itertools.chain(*padded)), p.device).view(len(rows), longest)
    lengths = to_device(counts, p.device)
    inside = torch.arange(longest, device=p.device, dtype=torch.long)[None, :] < lengths[:, None]
    p_token = p[:, :-1].gather(2, tokens[..., None])[..., 0]
    q_token = q[:, :-1].gather(2, tokens[..., None])[..., 0]
    ratio = torch.where(inside, p_token / q_token.clamp_min(torch.finfo(q.dtype).tiny), torch.zeros_like(p_token))
    return _Chains(p, q, ratio, lengths)


def _uniform(shape: Sequence[int], randomness: EngineRandomness) -> torch.Tensor:
    generator = randomness.generator(Stream.ACCEPTANCE)
    return torch.rand(tuple(shape), generator=generator, device=randomness.device, dtype=torch.float32)


def _finish(
    rows: Sequence[int], chains: _Chains, kept: torch.Tensor, weight: torch.Tensor, randomness: EngineRandomness
) -> list[tuple[int, list[int], int]]:
    """Draws the next token after `kept` tokens of each chain: the bonus token at its end, else from the residual."""
    lane = torch.arange(len(rows), device=kept.device, dtype=torch.long)
    p = chains.p[lane, kept]
    q = chains.q[lane, kept]
    complete = (kept == chains.lengths)[:, None]
    residual = torch.where(complete, p, (weight[:, None] * p - q).clamp_min(0))
    found = torch.stack([kept, sample_residual(residual, p, randomness)]).tolist()  # one copy from the device
    return [(row, list(range(count)), token) for row, count, token in zip(rows, *found, strict=True)]
