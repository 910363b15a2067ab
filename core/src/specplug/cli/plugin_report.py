"""What `specplug list` knows about a plugin: its metadata, and what came of importing it where that was asked for."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING, Any

import attrs

from specplug.plugins.finder import PluginRecord, find_plugins
from specplug.plugins.verifiers import own_verifiers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from specplug.plugins.registry import PluginRegistry


@attrs.frozen
class PluginReport:
    """A plugin, perhaps checked.

    Attributes:
        record: its metadata and status; an import that failed makes the status `failed`.
        hooks: the hooks its module implements; None if it was not imported.
        wraps: the hooks its module wraps; None if it was not imported.
        traceback: of a failed import.
        verifiers: its speculators that bring a `verify` of their own; None if it was not imported.
    """

    record: PluginRecord
    hooks: tuple[str, ...] | None = None
    wraps: tuple[str, ...] | None = None
    traceback: str | None = None
    verifiers: tuple[str, ...] | None = None

    @property
    def hook_summary(self) -> str:
        """Its hooks in one line; empty if it was not imported."""
        return ", ".join([*(self.hooks or ()), *(f"{name} (wrapper)" for name in self.wraps or ())])

    def as_json(self) -> dict[str, Any]:
        """The object of `specplug list --json`. Keys are only ever added."""
        record = self.record
        return {
            "method": record.method,
            "package": record.distribution,
            "version": record.version,
            "status": record.status,
            "summary": record.summary,
            "reason": record.reason,
            "entry_point": record.module,
            "location": record.location,
            "requires": record.requirement,
            "hooks": None if self.hooks is None else list(self.hooks),
            "wraps": None if self.wraps is None else list(self.wraps),
            "traceback": self.traceback,
            "overrides_verify": None if self.verifiers is None else bool(self.verifiers),
        }


def report_plugins(allowed: Iterable[str] | None, denied: Iterable[str]) -> list[PluginReport]:
    """Reports every installed plugin from metadata alone: nothing is imported."""
    return [PluginReport(record) for record in _sorted(find_plugins(allowed, denied))]


def check_plugins(allowed: Iterable[str] | None, denied: Iterable[str]) -> list[PluginReport]:
    """Reports every installed plugin; those that may be loaded are imported, one at a time."""
    from specplug.plugins.registry import PluginRegistry

    logger = logging.getLogger("specplug")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what failed is in the reports
    try:
        with contextlib.redirect_stdout(sys.stderr):
            registry = PluginRegistry(allowed, denied)
    finally:
        logger.setLevel(level)
    return [_checked(record, registry) for record in _sorted(registry.records)]


def _sorted(records: Iterable[PluginRecord]) -> list[PluginRecord]:
    return sorted(records, key=lambda record: (record.method, record.distribution))


def _checked(record: PluginRecord, registry: PluginRegistry) -> PluginReport:
    if record.status != "ok":
        return PluginReport(record)
    failure = registry.failures.get(record.method)
    if failure is not None:
        reason = failure.strip().splitlines()[-1].strip().removeprefix("specplug.errors.PluginError: ")
        return PluginReport(attrs.evolve(record, status="failed", reason=reason), traceback=failure)
    module = registry.plugin(record.method)
    hooks: list[str] = []
    wraps: list[str] = []
    for caller in registry.manager.get_hookcallers(module) or []:
        own = [implementation for implementation in caller.get_hookimpls() if implementation.plugin is module]
        (wraps if all(implementation.wrapper for implementation in own) else hooks).append(caller.name)
    if not hooks and not wraps:
        record = attrs.evolve(
            record, status="failed", reason="its module implements no hook (load_speculator is needed)"
        )
    return PluginReport(record, hooks=tuple(sorted(hooks)), wraps=tuple(sorted(wraps)), verifiers=own_verifiers(module))
