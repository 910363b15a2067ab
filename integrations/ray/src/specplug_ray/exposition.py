"""Metrics of several replicas as one text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


def merge(replicas: Iterable[tuple[str, bytes]]) -> bytes:
    """One exposition of those of several replicas.

    Args:
        replicas: for each its name, which becomes the label `replica`, and its exposition.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(list(replicas)))
    return generate_latest(registry)


class _Merged(Collector):
    def __init__(self, replicas: Sequence[tuple[str, bytes]]) -> None:
        self._replicas = replicas

    def describe(self) -> Iterator[Metric]:
        """Nothing: the names are not known before."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Every family once, with the samples of all replicas."""
        families: dict[str, Metric] = {}
        for name, text in self._replicas:
            for family in text_string_to_metric_families(text.decode()):
                kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                kept.samples += [
                    sample._replace(labels={**sample.labels, "replica": name}) for sample in family.samples
                ]
        yield from families.values()
