"""Which speculators are installed, from package metadata alone: nothing is imported here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Literal

import attrs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
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
    by_method: dict[str, list[PluginRecord]] = {}
    for record in dict.fromkeys(_records()):
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


def _records() -> Iterator[PluginRecord]:
    """Every entry point of the group, of one distribution after the other: damaged metadata costs only its own package."""
    seen: set[str] = set()
    for dist in metadata.distributions():
        name = _name_of(dist)
        if name in seen:
            continue  # a stale copy further down the path
        seen.add(name)
        try:
            yield from [_record(entry, dist) for entry in dist.entry_points if entry.group == GROUP]
        except Exception as error:
            if _mentions_group(dist):
                yield _unreadable("?", "?", name, dist, f"{type(error).__name__}: {error}")


def _name_of(dist: metadata.Distribution) -> str:
    """The distribution's normalized name, from that of its folder where it has one: reading metadata takes longer."""
    folder = getattr(getattr(dist, "_path", None), "name", "")
    name = folder.removesuffix(".dist-info").removesuffix(".egg-info").partition("-")[0]
    return canonicalize_name(name or dist.metadata["Name"] or "?")


def _mentions_group(dist: metadata.Distribution) -> bool:
    try:
        return f"[{GROUP}]" in (dist.read_text("entry_points.txt") or "")
    except Exception:
        return False


def _location(dist: metadata.Distribution) -> str:
    return str(dist.locate_file(""))


def _record(entry: metadata.EntryPoint, dist: metadata.Distribution) -> PluginRecord:
    name = dist.metadata["Name"]
    if not name:  # nor is anything known of what it requires
        return _unreadable(entry.name, entry.value, _name_of(dist), dist, "METADATA is missing, or names nothing")
    return PluginRecord(
        method=entry.name,
        module=entry.value,
        distribution=name,
        version=dist.version or "?",
        summary=dist.metadata["Summary"] or "",
        requirement=_core_requirement(dist.requires or []),
        location=_location(dist),
    )


def _unreadable(method: str, module: str, name: str, dist: metadata.Distribution, why: str) -> PluginRecord:
    reason = f"its metadata cannot be read: {why}; install it again"
    return PluginRecord(method, module, name, "?", "", "", _location(dist), "failed", reason)


def _core_requirement(requirements: Iterable[str]) -> str:
    """What a package asks of core, all such requirements together; those of extras and of other platforms do not count."""
    specifiers = SpecifierSet()
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and canonicalize_name(requirement.name) == CORE:
            specifiers &= requirement.specifier
    return str(specifiers)


def _judge(record: PluginRecord, allow_lists: list[set[str]], deny_list: set[str]) -> PluginRecord:
    if record.status != "ok":
        return record
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
