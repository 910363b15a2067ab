"""Chi-square tests against known distributions, and of two samples against each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from scipy.stats import chi2, chi2_contingency

THRESHOLD = 1e-6


def p_value(counts: np.ndarray, probs: np.ndarray, least_expected: float = 10.0) -> float:
    """Pearson's chi-square p-value of observed counts; rare cells are merged, impossible ones must stay empty.

    It is 1 where all cells are rare: then there is nothing to compare.
    """
    counts, probs = counts.ravel().astype(float), probs.ravel().astype(float)
    total = counts.sum()
    if counts[probs <= 0].any():
        return 0.0
    expected = probs / probs.sum() * total
    common = expected >= least_expected
    if not common.any():
        return 1.0
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] < least_expected:
        observed[-2] += observed[-1]
        wanted[-2] += wanted[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return float(chi2.sf(statistic, len(wanted) - 1))


def worst_p_value(samples: np.ndarray, joint: np.ndarray) -> float:
    """The smallest p-value of the joint of three tokens, of each two of them, and of each position's marginal.

    What is wrong with every 20th token is seen in 800 trials, 3 % in 2,000, 1 % in 200,000 (`test_planted_bias_is_seen`).

    Args:
        samples: int [trials, 3].
        joint: [V, V, V] exact probabilities.
    """
    vocabulary = joint.shape[0]
    flat = samples[:, 0] * vocabulary**2 + samples[:, 1] * vocabulary + samples[:, 2]
    values = [p_value(np.bincount(flat, minlength=vocabulary**3), joint)]
    for positions in ((0,), (1,), (2,), (0, 1), (1, 2), (0, 2)):
        marginal = joint.sum(axis=tuple(axis for axis in range(3) if axis not in positions))
        cells = np.ravel_multi_index(tuple(samples[:, positions].T), (vocabulary,) * len(positions))
        values.append(p_value(np.bincount(cells, minlength=marginal.size), marginal))
    return min(values)


def homogeneity_p_value(one: Counter[Any], other: Counter[Any]) -> float:
    """Of the hypothesis that two samples come from one distribution; rare outcomes are counted together."""
    keys = [key for key in one.keys() | other.keys() if one[key] + other[key] >= 20]
    table = [[each[key] for key in keys] for each in (one, other)]
    rest = [sum(each.values()) - sum(row) for each, row in zip((one, other), table, strict=True)]
    return float(
        chi2_contingency([[*row, left] if sum(rest) else row for row, left in zip(table, rest, strict=True)]).pvalue
    )
