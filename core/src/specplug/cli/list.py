"""`specplug list`: which speculators are installed, and whether they can be used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from specplug.cli.integrations.listing import integration_as_json, show_integrations
from specplug.cli.plugin_report import PluginReport, check_plugins, report_plugins
from specplug.cli.terminal import Terminal
from specplug.cli.views.table import Table
from specplug.plugins.integrations import find_integrations

if TYPE_CHECKING:
    from collections.abc import Sequence

NOTHING_INSTALLED = "No speculator is installed. Install one, for example:  pip install specplug-ngram"
_STYLES = {
    "ok": "green",
    "blocked": "yellow",
    "failed": "red",
    "incompatible": "red",
    "ambiguous": "red",
    "missing": "yellow",
}
_STATUS_COLUMN = 3


@click.command("list")
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Show entry points, locations, requirements, reasons, tracebacks, and integrations with other engines.",
)
@click.option("--check", is_flag=True, help="Import each allowed plugin and show its hooks; exit 1 if one fails.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects; their keys are stable.")
@click.option("--allow", metavar="NAME", multiple=True, help="Allow only this method or package. Repeatable.")
@click.option("--deny", metavar="NAME", multiple=True, help="Do not load this method or package. Repeatable.")
@click.pass_context
def list_command(
    ctx: click.Context, verbose: bool, check: bool, as_json: bool, allow: tuple[str, ...], deny: tuple[str, ...]
) -> None:
    """List the installed speculators and observers.

    METHOD is the value of "method" in a speculative config. STATUS is ok, or why the plugin cannot be used:
    blocked (by --allow, --deny, $SPECPLUG_ALLOW_PLUGINS or $SPECPLUG_DENY_PLUGINS), incompatible (made for another
    version of specplug), ambiguous (several packages provide the method), failed (its import raised; found by --check).
    Without --check, only package metadata is read.

    \b
    Examples:
      specplug list
      specplug list -v --check
      specplug list --json --deny specplug-ngram
    """  # noqa: D301
    reports = (check_plugins if check else report_plugins)(allow or None, deny)
    integrations = find_integrations() if verbose else []
    if as_json:
        listed = [*(report.as_json() for report in reports), *map(integration_as_json, integrations)]
        Terminal.out().line(json.dumps(listed, indent=2))
    elif not reports:
        Terminal.out().paragraph(NOTHING_INSTALLED)
    else:
        _show(Terminal.out(), reports, verbose=verbose, check=check)
    if verbose and not as_json:
        show_integrations(Terminal.out(), integrations)
    if check and any(report.record.status == "failed" for report in reports):
        ctx.exit(1)


def _show(terminal: Terminal, reports: Sequence[PluginReport], *, verbose: bool, check: bool) -> None:
    records = [report.record for report in reports]
    rows = [
        (
            r.method,
            r.distribution,
            r.version,
            r.status,
            f"(observer) {r.summary}" if r.kind == "observer" else r.summary,
        )
        for r in records
    ]
    Table(("METHOD", "PACKAGE", "VERSION", "STATUS", "SUMMARY"), rows).show(
        terminal,
        style=lambda row, column: _STYLES[records[row].status] if column == _STATUS_COLUMN else "",
        below=lambda row: _show_details(terminal, reports[row], verbose=verbose, check=check),
    )
    if verbose:
        return
    unusable = sum(record.status != "ok" for record in records)
    if unusable and not check:
        terminal.line()
        terminal.paragraph(f"{unusable} of {len(records)} cannot be used; see why with: specplug list -v")
    elif any(report.traceback for report in reports):
        terminal.line()
        terminal.paragraph("See the tracebacks with: specplug list -v --check")


def _show_details(terminal: Terminal, report: PluginReport, *, verbose: bool, check: bool) -> None:
    record = report.record
    details: list[tuple[str, str]] = []
    if verbose:
        details.append(("entry point", f"{record.method} = {record.module}"))
        details.append(("location", record.location))
        details.append(("requires", f"specplug{record.requirement}" if record.requirement else "any specplug"))
    if report.hooks is not None:
        details.append(("hooks", report.hook_summary or "none"))
    if report.verifiers:
        names = ", ".join(report.verifiers)
        details.append(("verify", f"its own ({names}): specplug does not check what it accepts"))
    if record.reason and (verbose or check):
        details.append((record.status, record.reason))
    for name, value in details:
        terminal.paragraph(f"    {name:<12}  {value}", indent=" " * 18)
    if verbose and report.traceback:
        for line in report.traceback.rstrip().splitlines():
            terminal.line(f"      {line}", "dim")
