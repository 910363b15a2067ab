"""Chi-square tests, without scipy."""

from __future__ import annotations

import torch

THRESHOLD = 1e-6
"""A smaller p-value fails. Seeds are fixed, so that a pass stays a pass."""


def chi_square_p(observed: torch.Tensor, expected: torch.Tensor, least: float = 10.0) -> float:
    """Pearson's p-value of observed counts; rare cells are merged, impossible ones must stay empty.

    Args:
        observed: counts, any shape.
        expected: their expectations, the same shape and sum.
        least: cells that expect fewer are merged.
    """
    observed, expected = observed.double().flatten(), expected.double().flatten()
    if bool((observed[expected <= 0] > 0).any()):
        return 0.0
    common = expected >= least
    counts = torch.cat([observed[common], observed[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    if wanted[-1] < least and len(wanted) > 1:
        counts[-2] += counts[-1]
        wanted[-2] += wanted[-1]
        counts, wanted = counts[:-1], wanted[:-1]
    if len(wanted) < 2:
        return 1.0
    statistic = ((counts - wanted).square() / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64, device="cpu")
    return float(torch.special.gammaincc(freedom, statistic / 2))


def uniform_p(values: torch.Tensor, bins: int = 32) -> float:
    """The p-value of values in [0, 1) that should be uniform."""
    counts = torch.bincount((values * bins).long().clamp(0, bins - 1), minlength=bins)
    return chi_square_p(counts, torch.full((bins,), len(values) / bins, dtype=torch.float32, device="cpu"))


def joint_p_values(samples: torch.Tensor, joint: torch.Tensor) -> dict[str, float]:
    """P-values of the joint of three tokens and of each position.

    Args:
        samples: int64 [trials, 3].
        joint: float64 [V, V, V], their exact probabilities.
    """
    vocabulary, trials = joint.shape[0], len(samples)
    joint = joint / joint.sum()
    flat = (samples[:, 0] * vocabulary + samples[:, 1]) * vocabulary + samples[:, 2]
    values = {
        "the joint of three tokens": chi_square_p(
            torch.bincount(flat, minlength=vocabulary**3), joint.flatten() * trials
        )
    }
    for position, others in enumerate(((1, 2), (0, 2), (0, 1))):
        counts = torch.bincount(samples[:, position], minlength=vocabulary)
        values[f"token {position + 1}"] = chi_square_p(counts, joint.sum(dim=others) * trials)
    return values
