"""Integrations in `specplug list -v`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specplug.cli.views.table import Table
from specplug.plugins.integrations import KNOWN, IntegrationRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specplug.cli.terminal import Terminal

_STYLES = {"ok": "green", "missing": "yellow", "incompatible": "red", "failed": "red"}
_STATUS_COLUMN = 3


def integration_as_json(record: IntegrationRecord) -> dict[str, object]:
    """Returns the object of `specplug list -v --json`; keys are only added, never removed."""
    return {
        "method": record.name,
        "package": record.distribution,
        "version": record.version,
        "status": record.status,
        "summary": record.summary,
        "reason": record.reason,
        "entry_point": record.module,
        "location": record.location,
        "kind": "integration",
        "runs_in": record.runs_in,
    }


def show_integrations(terminal: Terminal, records: Sequence[IntegrationRecord]) -> None:
    """Prints the table of integrations, and how to get those that are not installed."""
    terminal.line()
    if records:
        _show_table(terminal, records)
    for engine in sorted(KNOWN.keys() - {record.name for record in records}):
        terminal.paragraph(KNOWN[engine])


def _show_table(terminal: Terminal, records: Sequence[IntegrationRecord]) -> None:
    rows = [(r.name, r.distribution, r.version, r.status, r.runs_in or r.reason) for r in records]
    Table(("INTEGRATION", "PACKAGE", "VERSION", "STATUS", "RUNS IN"), rows).show(
        terminal,
        style=lambda row, column: _STYLES[records[row].status] if column == _STATUS_COLUMN else "",
        below=lambda row: _show_details(terminal, records[row]),
    )


def _show_details(terminal: Terminal, record: IntegrationRecord) -> None:
    details = [("entry point", f"{record.name} = {record.module}"), ("location", record.location)]
    if record.reason:
        details.append((record.status, record.reason))
    for name, value in details:
        terminal.paragraph(f"    {name:<12}  {value}", indent=" " * 18)
