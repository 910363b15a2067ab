"""A comparison as one JSON object, with everything that is needed to run it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import attrs

from specplug.bench.statistics import Estimate
from specplug.bench.summary import CostModel, Summary

SCHEMA = 1
"""Keys are only ever added; a change of meaning raises this number."""


@attrs.frozen
class About:
    """What was measured, on what, and how.

    Attributes:
        target: the model.
        dtype: it ran in.
        device: it ran on.
        workload: its name.
        prompt_tokens: the length of each prompt.
        max_tokens: generated for each.
        repetitions: of every contestant.
        engine: engine options that were given.
        machine: see `describe_machine`.
        versions: see `describe_versions`.
        date: when it was done, in UTC.
    """

    target: str
    dtype: str
    device: str
    workload: str
    prompt_tokens: Sequence[int]
    max_tokens: int
    repetitions: int
    engine: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str = attrs.field(factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def where(self) -> str:
        """The machine in a few words."""
        threads = self.machine["threads"]
        counted = "1 thread" if threads == 1 else f"{threads} threads"
        return self.machine.get("gpu") or f"{self.machine['processor']}, {counted}"


def as_json(about: About, summaries: Sequence[Summary]) -> dict[str, Any]:
    """The whole report."""
    return {"schema": SCHEMA, **attrs.asdict(about), "results": [_result(summary) for summary in summaries]}


def _result(summary: Summary) -> dict[str, Any]:
    result: dict[str, Any] = {
        "method": summary.label,
        "kind": summary.kind,
        "speculative_config": summary.config,
        "batch": summary.cell.batch,
        "temperature": summary.cell.temperature,
        "not_available": summary.missing,
    }
    if summary.missing is not None:
        return result
    drafted, accepted = summary.draft_tokens or (0, 0)
    return result | {
        "tokens_per_second": _estimate(summary.tokens_per_second),
        "ratio_to_plain": _estimate(summary.ratio),
        "first_token_seconds": _quantiles(summary.first_token),
        "inter_token_seconds": _quantiles(summary.token),
        "acceptance_length": _rounded(summary.acceptance_length),
        "acceptance_by_position": [_rounded(share) for share in summary.by_position],
        "draft_tokens": drafted,
        "accepted_draft_tokens": accepted,
        "cost_model": None if summary.cost_model is None else _cost_model(summary.cost_model),
        "same_outputs_as_plain": None if summary.same_outputs is None else list(summary.same_outputs),
        "speculator_faults": summary.faults,
        "unverified_methods": list(summary.unverified_methods),
        "learns": summary.learns,
        "tokens_per_second_by_repetition": [_rounded(value) for value in summary.samples],
    }


def _cost_model(model: CostModel) -> dict[str, Any]:
    values = {field.name: getattr(model, field.name) for field in attrs.fields(CostModel)}
    return {name: value.as_json() if isinstance(value, Estimate) else _rounded(value) for name, value in values.items()}


def _estimate(value: Estimate | None) -> dict[str, float] | None:
    return None if value is None else value.as_json()


def _quantiles(values: tuple[float | None, float | None]) -> dict[str, float | None]:
    return {"p50": _rounded(values[0]), "p99": _rounded(values[1])}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
