"""What the repetitions of one contestant come to: speed beside plain decoding, latencies, acceptance, the cost model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from specplug.bench.comparison import Comparison
from specplug.bench.contestant import PLAIN, Contestant, why_missing
from specplug.bench.measurement import DecodeCosts, Measurement
from specplug.bench.statistics import Estimate, estimate, paired_ratio, quantile
from specplug.bench.workload import Cell
from specplug.stats import SpeculationStats


@attrs.frozen
class CostModel:
    """The speed-up that acceptance and costs promise (Leviathan et al., 2211.17192), beside the one that was measured.

    All of it is about the steps that only decode, with every place of the batch taken: a prompt costs the same with any
    method.

    Attributes:
        tokens_per_step: τ, tokens that a sequence gains in a step, with or without a draft.
        plain_seconds: t₁, the target's forward in a step of plain decoding.
        verify_seconds: the target's forward in a step of the method.
        draft_seconds: what drafting takes in a step.
        other_seconds: what is left of a step: scheduling, verification, sampling, bookkeeping.
        predicted: τ · t₁ / (t_verify + t_draft).
        measured: decoding speed, as a ratio to plain decoding's.
        of_predicted: measured by predicted.
        promised: throughput, prompts included, as a ratio to plain decoding's, if decoding sped up as predicted and all
            else took as long as it does plainly.
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
        label: its name.
        kind: `plain`, `method` or `peer`.
        config: its speculative configuration.
        cell: the setting.
        missing: why there is nothing to show; None otherwise, and only then the rest is set.
        tokens_per_second: throughput, prompts included.
        ratio: of it to plain decoding's.
        first_token: (p50, p99) seconds to the first token.
        token: (p50, p99) seconds between tokens.
        acceptance_length: tokens per step that verified a draft; None without drafts.
        by_position: the share of drafts that were accepted up to each position, or further.
        draft_tokens: draft tokens verified, and accepted.
        cost_model: None where the steps are not seen.
        same_outputs: requests with the outputs of plain decoding, of how many; None where outputs are drawn.
        faults: failures of speculators.
        samples: tokens per second of each repetition.
        unverified_methods: those that bring a `verify` of their own, which core does not check.
        learns: whether its drafts may depend on earlier requests, so that every run had a fresh engine.
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
    """Every contestant under every setting, in the order they were given."""
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
    """The cost model of a method, paired by repetition; None where too little was seen."""
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
    """τ · t₁ / (t_verify + t_draft)."""
    step = (own.forward_seconds + own.draft_seconds) / own.steps
    return own.tokens / own.rows * (plain.forward_seconds / plain.steps) / step
