"""Finds installed integrations: packages that run speculators inside other engines. Nothing is imported.

An integration is an entry point of the group `specplug.integrations`, with the name of the other engine. Its package requires
that engine's distribution; where there is one for every kind of device, it names each, with the versions it supports, as an
extra of its own, and works if the requirements of any of these are met.
"""

from __future__ import annotations

from importlib import metadata
from typing import Literal

import attrs
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from specplug.plugins.finder import core_reason, core_requirement_of, location_of

GROUP = "specplug.integrations"
KNOWN = {
    "vllm": "To run speculators inside vLLM:  pip install specplug-vllm",
    "ray": "To serve from several replicas on Ray Serve:  pip install specplug-ray",
}
"""A line for each engine whose integration is not installed."""
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
    always = [r for r in requirements if _applies(r)]
    hosts = [r for r in always if canonicalize_name(r.name) == canonicalize_name(entry.name)]
    if not hosts:
        hosts = [r for r in requirements if r not in always and any(_applies(r, extra) for extra in extras)]
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


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
