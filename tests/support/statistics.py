"""Chi-square tests against known distributions, and of two samples against each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from scipy.stats import chi2, chi2_contingency

THRESHOLD = 1e-6


def p_value(counts: np.ndarray, probs: np.ndarray, least_expected: float = 10.0) -> float:
    """Pearson's chi-square p-value of observed counts; rare cells are merged, impossible ones must stay empty."""
    counts, probs = counts.ravel().astype(float), probs.ravel().astype(float)
    total = counts.sum()
    if counts[probs <= 0].any():
        return 0.0
    expected = probs / probs.sum() * total
    common = expected >= least_expected
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] < least_expected:
        observed[-2] += observed[-1]
        wanted[-2] += wanted[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return float(chi2.sf(statistic, len(wanted) - 1))


def worst_p_value(samples: np.ndarray, joint: np.ndarray) -> float:
    """The smallest p-value of the joint of three tokens and of each position's marginal.

    Args:
        samples: int [trials, 3].
        joint: [V, V, V] exact probabilities.
    """
    vocabulary = joint.shape[0]
    flat = samples[:, 0] * vocabulary**2 + samples[:, 1] * vocabulary + samples[:, 2]
    values = [p_value(np.bincount(flat, minlength=vocabulary**3), joint)]
    for position in range(3):
        marginal = joint.sum(axis=tuple(axis for axis in range(3) if axis != position))
        values.append(p_value(np.bincount(samples[:, position], minlength=vocabulary), marginal))
    return min(values)


def homogeneity_p_value(one: Counter[Any], other: Counter[Any]) -> float:
    """Of the hypothesis that two samples come from one distribution; rare outcomes are counted together."""
    keys = [key for key in one.keys() | other.keys() if one[key] + other[key] >= 20]
    table = [[each[key] for key in keys] for each in (one, other)]
    rest = [sum(each.values()) - sum(row) for each, row in zip((one, other), table, strict=True)]
    return float(
        chi2_contingency([[*row, left] if sum(rest) else row for row, left in zip(table, rest, strict=True)]).pvalue
    )
