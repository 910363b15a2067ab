"""Finds installed integrations: packages that run speculators inside other engines. Nothing is imported.

An integration is an entry point of the group `specplug.integrations`. Its package names each distribution of the other engine
that it runs in, with the versions it supports, as an extra of its own: one has several where there is one for every kind of
device. It works if the requirements of any of its extras are met.
"""

from __future__ import annotations

from importlib import metadata
from typing import Literal

import attrs
from packaging.requirements import Requirement

from specplug.plugins.finder import core_reason, core_requirement_of, location_of

GROUP = "specplug.integrations"
HINT = "No integration is installed. To run speculators inside vLLM:  pip install specplug-vllm"
IntegrationStatus = Literal["ok", "missing", "incompatible", "failed"]


@attrs.frozen
class IntegrationRecord:
    """One integration.

    Attributes:
        name: the entry point's name: the engine.
        module: the module that the entry point names.
        distribution: the package that contains it.
        version: the package's version.
        summary: the package's one-line description.
        location: the folder that the package is installed in.
        runs_in: the engine's installed distribution and version; empty if there is none.
        status: whether it can be used, as far as metadata tells.
        reason: why not.
    """

    name: str
    module: str
    distribution: str
    version: str
    summary: str
    location: str
    runs_in: str = ""
    status: IntegrationStatus = "ok"
    reason: str = ""


def find_integrations() -> list[IntegrationRecord]:
    """Lists every installed integration with its status, sorted by name."""
    found: dict[tuple[str, str], IntegrationRecord] = {}
    for dist in metadata.distributions():
        try:
            entries = [entry for entry in dist.entry_points if entry.group == GROUP]
        except Exception:
            continue  # damaged metadata: a plugin's is reported by find_plugins
        for entry in entries:
            record = _record(entry, dist)
            found.setdefault((record.name, record.distribution), record)
    return [found[key] for key in sorted(found)]


def _record(entry: metadata.EntryPoint, dist: metadata.Distribution) -> IntegrationRecord:
    record = IntegrationRecord(
        name=entry.name,
        module=entry.value,
        distribution=dist.metadata["Name"] or "?",
        version=dist.version or "?",
        summary=dist.metadata["Summary"] or "",
        location=location_of(dist),
    )
    try:
        requirements = [Requirement(text) for text in dist.requires or []]
        extras = dist.metadata.get_all("Provides-Extra") or []
        reason = core_reason(core_requirement_of(dist.requires or []))
    except Exception as error:
        why = " ".join(str(error).split())
        return attrs.evolve(record, status="failed", reason=f"its metadata cannot be read: {why}; install it again")
    if reason:
        return attrs.evolve(record, status="incompatible", reason=reason)
    hosts = [r for r in requirements if r.marker is not None and any(r.marker.evaluate({"extra": e}) for e in extras)]
    hosts = [r for r in hosts if r.marker is not None and not r.marker.evaluate({"extra": ""})]
    others = []
    for host in hosts:
        try:
            version = metadata.version(host.name)
        except metadata.PackageNotFoundError:
            continue
        installed = f"{host.name} {version}"
        if host.specifier.contains(version, prereleases=True):
            return attrs.evolve(record, runs_in=installed)
        others.append((installed, f"needs {host.name}{host.specifier}, this is {installed}"))
    if others:
        installed, reason = others[0]
        return attrs.evolve(record, runs_in=installed, status="incompatible", reason=reason)
    if hosts:
        names = " or ".join(f"{host.name}{host.specifier}" for host in hosts)
        return attrs.evolve(record, status="missing", reason=f"needs {names}, which is not installed")
    return record
