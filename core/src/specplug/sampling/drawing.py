"""Drawing draft tokens from distributions, each row with its own random stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sample(probs: torch.Tensor, generators: Sequence[torch.Generator], count: int = 1) -> torch.Tensor:
    """Draws tokens without replacement, in the order that lossless verification of sampled siblings needs.

    An exponential race: the tokens with the smallest noise / probability, in order of arrival, are draws without replacement
    (Kool et al. 1903.06059, in its Gumbel form). Noise comes from `row.generator`, never from a stream that verification uses.

    Args:
        probs: float32 [N, V], the distributions; what you report in `DraftDistributions` must be these.
        generators: N random streams, one for each distribution; the same one may occur more than once.
        count: tokens to draw from each distribution.

    Returns:
        int64 [N, count]. Where fewer than `count` tokens have a probability above zero, the surplus is -1.
    """
    noise = torch.empty_like(probs)
    for row, generator in enumerate(generators):
        if generator.device == noise.device:
            noise[row].exponential_(generator=generator)
        else:
            noise[row] = torch.empty(noise.shape[-1], device=generator.device, dtype=noise.dtype).exponential_(
                generator=generator
            )
    arrivals = noise.div_(probs).nan_to_num_(nan=float("inf"), posinf=float("inf"))
    if count == 1:
        return arrivals.argmin(dim=-1, keepdim=True)
    first = arrivals.topk(count, dim=-1, largest=False, sorted=True)
    return first.indices.masked_fill_(first.values.isinf(), -1)
