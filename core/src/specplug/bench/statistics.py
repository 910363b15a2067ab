"""Medians with bootstrap intervals, of paired repetitions."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

_RESAMPLES = 10_000
_LEVEL = 0.95


@attrs.frozen
class Estimate:
    """A median and its interval.

    Attributes:
        median: of the sample.
        low: where the 95 % interval begins.
        high: where it ends.
    """

    median: float
    low: float
    high: float

    def as_json(self, digits: int = 6) -> dict[str, float]:
        """With `digits` significant digits."""
        return {name: float(f"{value:.{digits}g}") for name, value in attrs.asdict(self).items()}


def estimate(values: Sequence[float]) -> Estimate:
    """The median with its percentile bootstrap interval: the medians of 10,000 samples drawn from the sample.

    The draws are the same every time. One value is its own interval: nothing is known about its scatter.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("no value to estimate a median from")
    sample = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(sample), size=(_RESAMPLES, len(sample)))
    medians = np.median(sample[draws], axis=1)
    tail = 50 * (1 - _LEVEL)
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Estimate(float(np.median(sample)), float(low), float(high))


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """The median of the ratios within repetitions: what slows a whole repetition down cancels out.

    Raises:
        ValueError: there are not as many values as base values, or none.
    """
    return estimate([value / own for value, own in zip(values, base, strict=True)])


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of all lie, interpolated; None without values."""
    return float(np.quantile(np.asarray(values, dtype=np.float64), share)) if values else None
