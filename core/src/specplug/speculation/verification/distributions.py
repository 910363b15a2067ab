"""For the rejection rules: draft distributions over the target's vocabulary, and sampling from residuals."""

from __future__ import annotations

import torch

from specplug.contract.types import DraftDistributions, Proposal
from specplug.model.device import to_device
from specplug.sampling.randomness import EngineRandomness, Stream, race


def draft_distributions(proposal: Proposal, row: int, vocabulary: int) -> torch.Tensor:
    """float32 [nodes, vocabulary]: the distribution each node of a row was drawn from, over target ids."""
    assert proposal.probs is not None
    probs = proposal.probs[row]
    assert isinstance(probs, DraftDistributions)
    values = probs.values.float()
    if probs.index is not None:
        values = values[to_device([int(i) for i in probs.index], values.device)]
    else:
        values = values[: len(proposal.tokens[row])]
    if probs.token_ids is None:
        return values
    full = torch.zeros(values.shape[0], vocabulary, device=values.device, dtype=torch.float32)
    return full.index_add_(1, probs.token_ids.to(values.device), values)


def sample_residual(residual: torch.Tensor, fallback: torch.Tensor, randomness: EngineRandomness) -> torch.Tensor:
    """Samples int64 [R] from unnormalised residuals [R, V].

    A residual may be all zero by rounding, if draft and target agree. Then the target's own distribution is used.
    """
    empty = residual.sum(dim=-1, keepdim=True) <= 0
    weights = torch.where(empty, fallback, residual)
    noise = torch.empty_like(weights).exponential_(generator=randomness.generator(Stream.RESIDUAL))
    return race(weights, noise)
