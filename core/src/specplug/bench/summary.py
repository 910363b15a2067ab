"""The results of a contestant over its repetitions: speed versus plain decoding, latencies, acceptance, cost model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from specplug.bench.comparison import Comparison
from specplug.bench.contestants import PLAIN, Contestant, why_missing
from specplug.bench.measurement import DecodeCosts, Measurement
from specplug.bench.workload import Cell
from specplug.stats import SpeculationStats

_RESAMPLES = 10_000
_LEVEL = 0.95


@attrs.frozen
class Estimate:
    """A median and its interval.

    Attributes:
        median: of the sample.
        low: lower bound of the 95 % interval.
        high: upper bound.
    """

    median: float
    low: float
    high: float

    def as_json(self, digits: int = 6) -> dict[str, float]:
        """Returns the values with `digits` significant digits."""
        return {name: float(f"{value:.{digits}g}") for name, value in attrs.asdict(self).items()}


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the median with its percentile bootstrap interval, from the medians of 10,000 resamples.

    The random seed is fixed. The interval of a single value has no width.

    Raises:
        ValueError: there are no values.
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
    """Returns the median of the ratios within repetitions, in which a slow repetition cancels out.

    Raises:
        ValueError: the numbers of values and base values differ, or there are none.
    """
    return estimate([value / own for value, own in zip(values, base, strict=True)])


def quantile(values: Sequence[float], share: float) -> float | None:
    """Returns an interpolated quantile; None without values."""
    return float(np.quantile(np.asarray(values, dtype=np.float64), share)) if values else None


@attrs.frozen
class CostModel:
    """The predicted speedup from acceptance and costs (Leviathan et al., 2211.17192), and the measured one.

    Only decode steps with a full batch count: a prompt costs the same with every method.

    Attributes:
        tokens_per_step: τ, tokens per sequence and step, with or without a draft.
        plain_seconds: t₁, the forward of the target in a step of plain decoding.
        verify_seconds: the forward of the target in a step of the method.
        draft_seconds: drafting in a step.
        other_seconds: the remainder of a step: scheduling, verification, sampling, bookkeeping.
        predicted: τ · t₁ / (t_verify + t_draft).
        measured: decoding speed, as a ratio to plain decoding.
        of_predicted: measured / predicted.
        promised: throughput, prompts included, as a ratio to plain decoding, if decoding sped up as predicted and all else
            took as long as in plain decoding.
    """

    tokens_per_step: float
    plain_seconds: float
    verify_seconds: float
    draft_seconds: float
    other_seconds: float
    predicted: Estimate
    measured: Estimate
    of_predicted: Estimate
    promised: Estimate


@attrs.frozen
class Summary:
    """One contestant under one setting.

    Attributes:
        label: the name.
        kind: `plain`, `method` or `peer`.
        config: the speculative configuration.
        cell: the setting.
        missing: why it could not run; the other attributes are set only if this is None.
        tokens_per_second: throughput, prompts included.
        ratio: of the throughput to that of plain decoding.
        first_token: (p50, p99) seconds to the first token.
        token: (p50, p99) seconds between tokens.
        acceptance_length: tokens per step that verified a draft; None without drafts.
        by_position: the share of drafts that were accepted at least up to each position.
        draft_tokens: (verified, accepted) draft tokens.
        cost_model: None if step costs are unknown.
        same_outputs: (requests with the output of plain decoding, all requests); None if outputs are sampled.
        faults: failures of speculators.
        samples: tokens per second of each repetition.
        unverified_methods: methods with a `verify` of their own, which core does not check.
        learns: whether drafts may depend on earlier requests; every run then used a new engine.
    """

    label: str
    kind: str
    config: Mapping[str, Any] | None
    cell: Cell
    missing: str | None = None
    tokens_per_second: Estimate | None = None
    ratio: Estimate | None = None
    first_token: tuple[float | None, float | None] = (None, None)
    token: tuple[float | None, float | None] = (None, None)
    acceptance_length: float | None = None
    by_position: Sequence[float] = ()
    draft_tokens: tuple[int, int] | None = None
    cost_model: CostModel | None = None
    same_outputs: tuple[int, int] | None = None
    faults: int = 0
    samples: Sequence[float] = ()
    unverified_methods: Sequence[str] = ()
    learns: bool = False


def summarize(comparison: Comparison) -> list[Summary]:
    """Returns a summary of every contestant under every setting, in order."""
    return [
        _summary(comparison, contestant, cell) for cell in comparison.cells for contestant in comparison.contestants
    ]


def _summary(comparison: Comparison, contestant: Contestant, cell: Cell) -> Summary:
    about = (contestant.label, contestant.kind, contestant.config, cell)
    missing = why_missing(contestant, comparison.workload, cell)
    if missing is not None:
        return Summary(*about, missing)
    runs, plain = comparison.runs[cell, contestant.label], comparison.runs[cell, PLAIN]
    speeds = [run.tokens_per_second for run in runs]
    firsts = [seconds for run in runs for seconds in run.first_token_seconds]
    gaps = [seconds for run in runs for seconds in run.token_seconds]
    stats = _total_stats(runs)
    spec_steps = stats.num_spec_steps if stats is not None else 0
    histogram = stats.acceptance_histogram if stats is not None else []
    return Summary(
        *about,
        tokens_per_second=estimate(speeds),
        ratio=paired_ratio(speeds, [run.tokens_per_second for run in plain]),
        first_token=(quantile(firsts, 0.5), quantile(firsts, 0.99)),
        token=(quantile(gaps, 0.5), quantile(gaps, 0.99)),
        acceptance_length=stats.mean_acceptance_length if stats is not None else None,
        by_position=[sum(histogram[position:]) / spec_steps for position in range(1, len(histogram))],
        draft_tokens=(stats.num_draft_tokens, stats.num_accepted_draft_tokens) if stats and spec_steps else None,
        cost_model=cost_model(runs, plain) if contestant.kind == "method" else None,
        same_outputs=_same_outputs(runs, plain) if cell.temperature == 0 and contestant.label != PLAIN else None,
        faults=sum(run.faults for run in runs),
        samples=speeds,
        unverified_methods=runs[-1].unverified_methods,
        learns=contestant.learns,
    )


def _total_stats(runs: Sequence[Measurement]) -> SpeculationStats | None:
    if any(run.stats is None for run in runs):
        return None
    total = SpeculationStats()
    for run in runs:
        assert run.stats is not None
        total.add(run.stats)
    return total


def _same_outputs(runs: Sequence[Measurement], plain: Sequence[Measurement]) -> tuple[int, int]:
    pairs = [
        pair for run, base in zip(runs, plain, strict=True) for pair in zip(run.outputs, base.outputs, strict=True)
    ]
    return sum(own == base for own, base in pairs), len(pairs)


def cost_model(runs: Sequence[Measurement], plain: Sequence[Measurement]) -> CostModel | None:
    """Returns the cost model of a method, paired by repetition; None without measured decode steps."""
    seen = [(o.decode, p.decode, p.seconds) for o, p in zip(runs, plain, strict=True) if o.decode and p.decode]
    seen = [(o, p, seconds) for o, p, seconds in seen if o.forward_seconds and p.forward_seconds]
    pairs = [(o, p) for o, p, _ in seen]
    if not pairs:
        return None
    predicted = [_predict(o, p) for o, p in pairs]
    measured = [(o.tokens / o.seconds) / (p.tokens / p.seconds) for o, p in pairs]
    promised = [s / (s - p.seconds + p.seconds / ratio) for (_, p, s), ratio in zip(seen, predicted, strict=True)]
    return CostModel(
        tokens_per_step=statistics.median(o.tokens / o.rows for o, _ in pairs),
        plain_seconds=statistics.median(p.forward_seconds / p.steps for _, p in pairs),
        verify_seconds=statistics.median(o.forward_seconds / o.steps for o, _ in pairs),
        draft_seconds=statistics.median(o.draft_seconds / o.steps for o, _ in pairs),
        other_seconds=statistics.median((o.seconds - o.forward_seconds - o.draft_seconds) / o.steps for o, _ in pairs),
        predicted=estimate(predicted),
        measured=estimate(measured),
        of_predicted=paired_ratio(measured, predicted),
        promised=estimate(promised),
    )


def _predict(own: DecodeCosts, plain: DecodeCosts) -> float:
    """Returns τ · t₁ / (t_verify + t_draft)."""
    step = (own.forward_seconds + own.draft_seconds) / own.steps
    return own.tokens / own.rows * (plain.forward_seconds / plain.steps) / step
