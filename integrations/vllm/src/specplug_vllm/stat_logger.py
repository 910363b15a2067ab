"""Publishes speculators' counters with vLLM's metrics (`vllm.stat_logger_plugins`), under the names of specplug's server."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from specplug_vllm.counters import CounterFile, counter_path
from specplug_vllm.settings import CLASS

_LABELS = ["engine", "method"]
_COUNTERS: dict[str, Any] = {}
"""Prometheus refuses a second metric of a name; two engines of a process share them."""


def _metrics() -> dict[str, Any]:
    if not _COUNTERS:
        _COUNTERS.update(
            draft_tokens=Counter("specplug:spec_decode_num_draft_tokens", "Draft tokens, by method.", _LABELS),
            accepted_tokens=Counter(
                "specplug:spec_decode_num_accepted_tokens", "Draft tokens that were accepted, by method.", _LABELS
            ),
            propose_seconds=Counter("specplug:spec_decode_propose_seconds", "Time spent on drafting.", _LABELS),
            faults=Counter(
                "specplug:speculator_faults", "Faults of speculators; three in a row switch one off.", _LABELS
            ),
            enabled=Gauge("specplug:speculator_enabled", "Whether a speculator is still asked.", _LABELS),
        )
    return _COUNTERS


class SpecplugStatLogger(StatLoggerBase):
    """The speculators' counters of one engine; nothing where another method drafts."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        speculative = vllm_config.speculative_config
        self._path = None
        if speculative is not None and speculative.method == "custom_class" and speculative.model == CLASS:
            self._path = counter_path(vllm_config, engine_index)
        self._engine = str(engine_index)
        self._file: CounterFile | None = None
        self._last: dict[tuple[str, str], float] = {}

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Called after every step, in the process that publishes."""
        if self._path is None:
            return
        if self._file is None:
            try:
                self._file = CounterFile(self._path, "r")
            except OSError:  # not there yet, or the worker is on another machine
                return
        metrics = _metrics()
        for method, values in self._file.read().items():
            for name, value in values.items():
                metric = metrics[name].labels(self._engine, method)
                if name == "enabled":
                    metric.set(value)
                else:
                    metric.inc(max(0.0, value - self._last.get((method, name), 0.0)))
                self._last[method, name] = value

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
