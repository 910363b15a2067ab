"""Which speculators are installed, from package metadata alone: nothing is imported here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import metadata
from typing import Literal

import attrs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from specplug.version import __version__

GROUP = "specplug"
CORE = "specplug"
ALLOW_VARIABLE = "SPECPLUG_ALLOW_PLUGINS"
DENY_VARIABLE = "SPECPLUG_DENY_PLUGINS"

Status = Literal["ok", "blocked", "failed", "incompatible", "ambiguous"]


@attrs.frozen
class PluginRecord:
    """One entry point of group `specplug`.

    Attributes:
        method: the entry point's name, which users put in their configuration.
        module: what the entry point names.
        distribution: the package that brings it.
        version: of the package.
        summary: the package's one-line description.
        requirement: what the package asks of core, or an empty string.
        location: the folder the package is installed in.
        status: whether it can be loaded, as far as metadata tells.
        reason: why not.
    """

    method: str
    module: str
    distribution: str
    version: str
    summary: str
    requirement: str
    location: str
    status: Status = "ok"
    reason: str = ""


def find_plugins(allowed: Iterable[str] | None = None, denied: Iterable[str] = ()) -> list[PluginRecord]:
    """Lists every installed speculator with its status, sorted by method.

    Args:
        allowed: methods or distributions that may be loaded; None allows all. `$SPECPLUG_ALLOW_PLUGINS` (comma-separated)
            narrows it further.
        denied: methods or distributions that may not; `$SPECPLUG_DENY_PLUGINS` adds to it.
    """
    allow_lists = [set(_names(allowed))] if allowed is not None else []
    if os.environ.get(ALLOW_VARIABLE):
        allow_lists.append(set(_names(os.environ[ALLOW_VARIABLE].split(","))))
    deny_list = set(_names(denied)) | set(_names(os.environ.get(DENY_VARIABLE, "").split(",")))
    records = [_record(entry) for entry in metadata.entry_points(group=GROUP)]
    by_method: dict[str, list[PluginRecord]] = {}
    for record in dict.fromkeys(records):
        by_method.setdefault(record.method, []).append(record)
    judged: list[PluginRecord] = []
    for method in sorted(by_method):
        rivals = sorted(by_method[method], key=lambda record: record.distribution)
        rivals = [_judge(record, allow_lists, deny_list) for record in rivals]
        loadable = [record for record in rivals if record.status == "ok"]
        if len(loadable) > 1:
            names = ", ".join(sorted(record.distribution for record in loadable))
            reason = f"{len(loadable)} packages provide '{method}': {names}; uninstall or deny all but one"
            rivals = [attrs.evolve(r, status="ambiguous", reason=reason) if r.status == "ok" else r for r in rivals]
        judged.extend(rivals)
    return judged


def _names(names: Iterable[str]) -> list[str]:
    return [canonicalize_name(name.strip()) for name in names if name.strip()]


def _record(entry: metadata.EntryPoint) -> PluginRecord:
    dist = entry.dist
    if dist is None:
        return PluginRecord(entry.name, entry.value, "?", "?", "", "", "?")
    return PluginRecord(
        method=entry.name,
        module=entry.value,
        distribution=dist.metadata["Name"] or "?",
        version=dist.version or "?",
        summary=dist.metadata["Summary"] or "",
        requirement=_core_requirement(dist.requires or []),
        location=str(dist.locate_file("")),
    )


def _core_requirement(requirements: Iterable[str]) -> str:
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if canonicalize_name(requirement.name) == CORE:
            return str(requirement.specifier)
    return ""


def _judge(record: PluginRecord, allow_lists: list[set[str]], deny_list: set[str]) -> PluginRecord:
    names = {canonicalize_name(record.method), canonicalize_name(record.distribution)}
    if names & deny_list:
        return attrs.evolve(record, status="blocked", reason="on the deny-list")
    if any(not names & allowed for allowed in allow_lists):
        return attrs.evolve(record, status="blocked", reason="not on the allow-list")
    specifier = Requirement(f"{CORE}{record.requirement}").specifier
    if not specifier.contains(__version__, prereleases=True):
        reason = f"needs {CORE}{record.requirement}, this is {CORE} {__version__}"
        return attrs.evolve(record, status="incompatible", reason=reason)
    return record
