"""A comparison as one JSON object, with everything that is needed to repeat it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import attrs
import torch

from specplug.bench.summary import CostModel, Estimate, Summary
from specplug.version import __version__

_PACKAGES = ("torch", "transformers", "numpy")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns the processor, cores, threads, memory, and the GPU if it is used."""
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def describe_versions(packages: dict[str, str]) -> dict[str, str]:
    """Returns the versions of Python, specplug, its main dependencies, and `packages` (name → version)."""
    found = {"python": platform.python_version(), "specplug": __version__}
    for name in _PACKAGES:
        found[name] = metadata.version(name)
    return found | packages


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


SCHEMA = 1
"""Keys are only added, never removed; a change of meaning increments this number."""


@attrs.frozen
class About:
    """The conditions of a comparison.

    Attributes:
        target: the model.
        dtype: of the target.
        device: of the target.
        workload: its name.
        prompt_tokens: the length of each prompt.
        max_tokens: generated for each.
        repetitions: of each measurement.
        engine: the engine options.
        machine: see `describe_machine`.
        versions: see `describe_versions`.
        date: of the comparison, in UTC.
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
        """A short description of the machine."""
        threads = self.machine["threads"]
        counted = "1 thread" if threads == 1 else f"{threads} threads"
        return self.machine.get("gpu") or f"{self.machine['processor']}, {counted}"


def as_json(about: About, summaries: Sequence[Summary]) -> dict[str, Any]:
    """Returns the report."""
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
