"""The server's Prometheus metrics.

What vLLM measures too has its `vllm:` name and meaning, so that its dashboards, autoscalers and load generators work; what
only specplug has is named `specplug:`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from specplug.metrics import Counter, Gauge, Vector, engine_metrics
from specplug.request import Request
from specplug.stats import DraftCounts, accepted_by_position
from specplug.version import __version__

if TYPE_CHECKING:
    from specplug.engine.engine import Engine

_LATENCIES = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_HELP = {
    "vllm:num_requests_running": "Sequences in the batch",
    "vllm:num_requests_waiting": "Sequences that wait for a row",
    "vllm:kv_cache_usage_perc": "Share of the KV blocks in use, from 0 to 1",
    "vllm:num_preemptions": "Sequences that were preempted and recomputed",
    "vllm:prompt_tokens": "Prompt tokens of the requests",
    "vllm:generation_tokens": "Generated tokens",
    "vllm:prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
    "vllm:prefix_cache_hits": "Prompt tokens found in the prefix cache",
    "vllm:spec_decode_num_drafts": "Drafts verified",
    "vllm:spec_decode_num_draft_tokens": "Draft tokens verified",
    "vllm:spec_decode_num_accepted_tokens": "Draft tokens accepted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "Draft tokens accepted, by position in the draft",
}


class ServerMetrics:
    """All metrics of one server, in a registry of their own.

    Args:
        model_name: a label of every metric.

    Attributes:
        registry: the registry.
        observer: times requests; for `AsyncLLM`.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = prometheus.CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self.observer = RequestTimes(self.registry, self._labels)
        self._responses = prometheus.Counter(
            "specplug:http_responses", "HTTP responses, by path and status", ("path", "status"), registry=self.registry
        )
        info = prometheus.Info("specplug:build", "Version of the server", registry=self.registry)
        info.info({"version": __version__})

    def watch(self, engine: Engine) -> None:
        """Exports the counters of an engine."""
        self.registry.register(_EngineCollector(engine, self._labels))

    def count_response(self, path: str, status: int) -> None:
        """Counts a response."""
        self._responses.labels(path, str(status)).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return prometheus.generate_latest(self.registry)


class RequestTimes:
    """Times of requests as histograms. A `StreamObserver`: the engine's thread calls it."""

    def __init__(self, registry: prometheus.CollectorRegistry, labels: dict[str, str]) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            metric = prometheus.Histogram(name, text, tuple(labels), registry=registry, buckets=buckets)
            return metric.labels(*labels.values())

        self._first = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token", _FIRST_TOKEN)
        self._between = histogram(
            "vllm:inter_token_latency_seconds",
            "Between outputs, divided by the tokens in them: one observation per token",
            _BETWEEN_TOKENS,
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token", _LATENCIES)
        self._prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens per sequence", _TOKENS)
        self._generated = histogram("vllm:request_generation_tokens", "Generated tokens per sequence", _TOKENS)
        self._ended = prometheus.Counter(
            "vllm:request_success", "Sequences that ended, by reason", (*labels, "finished_reason"), registry=registry
        )
        self._label_values = tuple(labels.values())

    def add(self, request: Request, num_tokens: int, seconds: float) -> None:
        """Observes new tokens."""
        if not num_tokens:
            return
        if request.num_output_tokens == num_tokens:
            self._first.observe(seconds)
            return
        for _ in range(num_tokens):
            self._between.observe(seconds / num_tokens)

    def end(self, request: Request) -> None:
        """Observes the end of a sequence."""
        self._ended.labels(*self._label_values, request.finish_reason or "").inc()
        self._prompt.observe(request.num_prompt_tokens)
        self._generated.observe(request.num_output_tokens)
        if request.finished_time is not None:
            self._whole.observe(request.finished_time - request.arrival_time)


class _EngineCollector(Collector):
    """Reads an engine's counters when they are scraped; nothing is counted twice."""

    def __init__(self, engine: Engine, labels: dict[str, str]) -> None:
        self._engine = engine
        self._names = tuple(labels)
        self._values = tuple(labels.values())

    def collect(self) -> Iterator[prometheus.Metric]:
        """The current values."""
        if self._engine.is_closed:
            return
        for metric in engine_metrics(self._engine):
            text = _HELP.get(metric.name, metric.name)
            if isinstance(metric, Gauge):
                yield self._one(GaugeMetricFamily, metric.name, text, metric.value)
            elif isinstance(metric, Counter):
                yield self._one(CounterMetricFamily, metric.name, text, metric.value)
            elif isinstance(metric, Vector):
                yield self._vector(metric.name, text, "position", dict(enumerate(metric.values)))
        by_method = dict(self._engine.stats.by_method)
        for name, text, values in (
            (
                "specplug:spec_decode_num_drafts",
                "Drafts verified, by method",
                {method: counts.num_drafts for method, counts in by_method.items()},
            ),
            (
                "specplug:spec_decode_num_draft_tokens",
                "Draft tokens verified, by method",
                {method: counts.num_draft_tokens for method, counts in by_method.items()},
            ),
            (
                "specplug:spec_decode_num_accepted_tokens",
                "Draft tokens accepted, by method",
                {method: counts.num_accepted_draft_tokens for method, counts in by_method.items()},
            ),
            ("specplug:spec_decode_propose_seconds", "Time spent on drafting", dict(self._engine.propose_seconds)),
            ("specplug:speculator_faults", "Faults of speculators", dict(self._engine.faults)),
        ):
            yield self._vector(name, text, "method", values)
        yield self._by_position(by_method)
        yield self._one(CounterMetricFamily, "specplug:engine_steps", "Steps of the engine", self._engine.num_steps)

    def _one(self, family: Any, name: str, text: str, value: float) -> prometheus.Metric:
        metric = family(name, text, labels=self._names)
        metric.add_metric(self._values, value)
        return metric

    def _by_position(self, by_method: Mapping[str, DraftCounts]) -> prometheus.Metric:
        metric = CounterMetricFamily(
            "specplug:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by method and position in the draft",
            labels=(*self._names, "method", "position"),
        )
        for method, counts in by_method.items():
            for position, value in enumerate(accepted_by_position(counts.acceptance_histogram)):
                metric.add_metric((*self._values, method, str(position)), value)
        return metric

    def _vector(self, name: str, text: str, label: str, values: Mapping[Any, float]) -> prometheus.Metric:
        metric = CounterMetricFamily(name, text, labels=(*self._names, label))
        for key, value in values.items():
            metric.add_metric((*self._values, str(key)), value)
        return metric
