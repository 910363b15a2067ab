"""Finds installed plugins from package metadata. Nothing is imported.

There are two groups of entry points. `specplug` contains speculators; an engine imports those that it is configured with.
`specplug.observers` contains modules that only wrap hooks; every engine imports them. So a speculator that is not configured
cannot do harm, whatever its import does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Literal
from urllib.parse import urlparse
from urllib.request import url2pathname

import attrs
from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from specplug.version import __version__

Kind = Literal["speculator", "observer"]
GROUP, OBSERVERS = "specplug", "specplug.observers"
_KINDS: dict[str, Kind] = {GROUP: "speculator", OBSERVERS: "observer"}
CORE = "specplug"
ALLOW_VARIABLE = "SPECPLUG_ALLOW_PLUGINS"
DENY_VARIABLE = "SPECPLUG_DENY_PLUGINS"

Status = Literal["ok", "blocked", "failed", "incompatible", "ambiguous"]


@attrs.frozen
class PluginRecord:
    """One entry point.

    Attributes:
        method: the entry point's name; for a speculator, the method that users configure.
        module: the module, or object in a module, that the entry point names.
        distribution: the package that contains it.
        version: the package's version.
        summary: the package's one-line description.
        requirement: the package's version range for core, or an empty string.
        location: the folder that the package is installed in; for an editable installation, that of its sources.
        status: whether it can be loaded, as far as metadata tells.
        reason: why it cannot be loaded.
        kind: speculator or observer, by the entry point's group.
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
    kind: Kind = "speculator"


def find_plugins(allowed: Iterable[str] | None = None, denied: Iterable[str] = ()) -> list[PluginRecord]:
    """Lists every installed plugin with its status, sorted by method.

    Args:
        allowed: methods or distributions that may be loaded; None allows all. `$SPECPLUG_ALLOW_PLUGINS` (comma-separated)
            narrows it further.
        denied: methods or distributions that may not; `$SPECPLUG_DENY_PLUGINS` adds to it.
    """
    allow_lists = [set(_names(allowed))] if allowed is not None else []
    if os.environ.get(ALLOW_VARIABLE):
        allow_lists.append(set(_names(os.environ[ALLOW_VARIABLE].split(","))))
    deny_list = set(_names(denied)) | set(_names(os.environ.get(DENY_VARIABLE, "").split(",")))
    by_method: dict[tuple[str, Kind], list[PluginRecord]] = {}
    for record in dict.fromkeys(_records()):
        by_method.setdefault((record.method, record.kind), []).append(record)
    judged: list[PluginRecord] = []
    for method, kind in sorted(by_method):
        rivals = sorted(by_method[method, kind], key=lambda record: record.distribution)
        rivals = [_judge(record, allow_lists, deny_list) for record in rivals]
        loadable = [record for record in rivals if record.status == "ok"]
        names = sorted({record.distribution for record in loadable})
        if len(loadable) > 1:
            reason = f"{len(names)} packages provide '{method}': {', '.join(names)}; uninstall or deny all but one"
            if len(names) == 1:
                reason = f"package {names[0]} has more than one entry point '{method}'; report it to its author"
            rivals = [attrs.evolve(r, status="ambiguous", reason=reason) if r.status == "ok" else r for r in rivals]
        judged.extend(rivals)
    return judged


def _names(names: Iterable[str]) -> list[str]:
    return [canonicalize_name(name.strip()) for name in names if name.strip()]


def _records() -> Iterator[PluginRecord]:
    """All entry points of both groups. Damaged metadata affects only its own package."""
    seen: set[str] = set()
    for dist in metadata.distributions():
        name = _name_of(dist)
        if name in seen:
            continue  # a stale copy further down the path
        seen.add(name)
        try:
            yield from [_record(entry, dist) for entry in dist.entry_points if entry.group in _KINDS]
        except Exception as error:
            if _mentions_group(dist):
                yield _unreadable("?", "?", name, dist, f"{type(error).__name__}: {error}")


def _name_of(dist: metadata.Distribution) -> str:
    """The distribution's normalized name, from its folder's name if possible: reading metadata takes longer."""
    folder = getattr(getattr(dist, "_path", None), "name", "")
    name = folder.removesuffix(".dist-info").removesuffix(".egg-info").partition("-")[0]
    return canonicalize_name(name or dist.metadata["Name"] or "?")


def _mentions_group(dist: metadata.Distribution) -> bool:
    """Whether a distribution with damaged metadata is a plugin."""
    try:
        path = getattr(dist, "_path", None)
        raw = (path / "entry_points.txt").read_bytes() if path else (dist.read_text("entry_points.txt") or "").encode()
    except Exception:
        return False
    return f"[{GROUP}".encode() in raw


def location_of(dist: metadata.Distribution) -> str:
    """The folder that a distribution is installed in; for an editable installation, that of its sources."""
    try:
        origin = json.loads(dist.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            return url2pathname(urlparse(origin["url"]).path)
    except Exception:
        pass  # a format of another tool
    return str(dist.locate_file(""))


def _record(entry: metadata.EntryPoint, dist: metadata.Distribution) -> PluginRecord:
    name = dist.metadata["Name"]
    if not name:  # then its requirements are unknown too
        return _unreadable(entry.name, entry.value, _name_of(dist), dist, "METADATA is missing, or has no name")
    try:
        requirement = core_requirement_of(dist.requires or [])
    except (InvalidRequirement, UndefinedComparison, UndefinedEnvironmentName) as error:
        what = " ".join(str(error).split())
        return _unreadable(entry.name, entry.value, name, dist, f"its requirement on {CORE} is invalid: {what}")
    return PluginRecord(
        method=entry.name,
        module=entry.value,
        distribution=name,
        version=dist.version or "?",
        summary="".join(letter for letter in dist.metadata["Summary"] or "" if letter.isprintable()),
        requirement=requirement,
        location=location_of(dist),
        kind=_KINDS[entry.group],
    )


def _unreadable(method: str, module: str, name: str, dist: metadata.Distribution, why: str) -> PluginRecord:
    reason = f"its metadata cannot be read: {why}; install it again"
    return PluginRecord(method, module, name, "?", "", "", location_of(dist), "failed", reason)


def core_requirement_of(requirements: Iterable[str]) -> str:
    """The version range for core: all its requirements together, without those of extras and of other platforms."""
    specifiers = SpecifierSet()
    for text in requirements:
        if not re.match(rf"\s*{CORE}(?![\w.-])", text, re.IGNORECASE):
            continue
        requirement = Requirement(text)
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
    if reason := core_reason(record.requirement):
        return attrs.evolve(record, status="incompatible", reason=reason)
    return record


def core_reason(requirement: str) -> str:
    """Why this version of core is not what a package requires; empty if it is."""
    if Requirement(f"{CORE}{requirement}").specifier.contains(__version__, prereleases=True):
        return ""
    return f"needs {CORE}{requirement}, this is {CORE} {__version__}"
