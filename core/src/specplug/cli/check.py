"""`specplug check`: the conformance kit, on an installed speculator."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import click

from specplug.cli.check_report import CheckReport
from specplug.cli.libraries import check_plugins, import_libraries
from specplug.cli.speculative_option import hint_at_keys, read_speculative_config
from specplug.cli.terminal import Terminal
from specplug.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from specplug.testing.check import Check


def _explain(ctx: click.Context, option: click.Parameter, name: str | None) -> None:
    if name is None or ctx.resilient_parsing:
        return
    import_libraries()
    from specplug.cli.check_run import find_check

    Terminal.out().paragraph(find_check(name).explanation.replace("**", ""))
    ctx.exit()


@click.command("check", short_help="Check that a speculator keeps the contract.")
@click.argument("method")
@click.option("--target", metavar="MODEL", help="Check on this folder, hub name or tiny. [default: tiny random models]")
@click.option(
    "--speculative-config", metavar="JSON", help="The method's keys, or a file with them; needed where it needs keys."
)
@click.option("--only", metavar="CHECK", multiple=True, help="Run this check, and startup. May be repeated.")
@click.option("--quick", is_flag=True, help="Fewer trials and targets.")
@click.option(
    "--explain",
    metavar="CHECK",
    is_eager=True,
    expose_value=False,
    callback=_explain,
    help="Say what a check proves and where to look when it fails, and run nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one object; its keys are stable.")
@click.pass_context
def check(
    ctx: click.Context,
    method: str,
    target: str | None,
    speculative_config: str | None,
    only: tuple[str, ...],
    quick: bool,
    as_json: bool,
) -> None:
    """Run the conformance kit on the installed speculator METHOD.

    Every check ends as ok, failed, not applicable, or nothing seen; after a fault with which it cannot work at all the rest
    is not run. The exit status is 1 if any failed. Without --target
    the kit makes small random models of several architectures; a method that needs a draft or a head of its own is checked
    on the target that it was made for. A plugin that only wraps hooks is checked under a small speculator of the kit's.

    \b
    Examples:
      specplug check ngram
      specplug check draft_model --target tiny --quick
      specplug check mine --speculative-config '{"window": 3}' --json
      specplug check --explain budgets
    """  # noqa: D301
    from specplug.plugins.finder import find_plugins

    config = _method_config(method, read_speculative_config(speculative_config))
    out = Terminal.out()
    with contextlib.redirect_stdout(sys.stderr):  # standard output gets the verdicts, whatever a plugin may print
        if not any(record.method == method and record.kind == "observer" for record in find_plugins()):
            _check_keys(config, target)
        import_libraries()
        from specplug.cli.check_run import choose_checks, make_subject, preflight, whole_kit
        from specplug.testing.runner import run_checks

        with tempfile.TemporaryDirectory(prefix="specplug-check-") as root:
            subject, is_observer = make_subject(root, method, config, target, quick=quick)
            checks = choose_checks(only, is_observer=is_observer)
            report = CheckReport.begin(method, target, whole_kit(is_observer=is_observer))
            report.overrides_verify = preflight(subject, method, has_target=target is not None)
            with _shown(out, report, checks, as_json=as_json):
                run_checks(subject, checks, lambda result: report.add(result, None if as_json else out))
    if as_json:
        out.line(json.dumps(report.as_json(), indent=2))
    else:
        report.show_summary(out)
    if report.failed:
        ctx.exit(1)


def _check_keys(config: dict[str, Any], target: str | None) -> None:
    """Refuses what can be refused without importing PyTorch."""
    from specplug.config.engine import EngineConfig

    try:
        check_plugins(EngineConfig.create(target or "tiny", speculative_config=config))
    except ConfigurationError as error:
        hint_at_keys(error, has_target=target is not None)
        raise


@contextlib.contextmanager
def _shown(out: Terminal, report: CheckReport, checks: tuple[Check, ...], *, as_json: bool) -> Iterator[None]:
    report.width = max(len(check.name) for check in checks)
    if not as_json:
        report.show_header(out)
    yield


def _method_config(method: str, given: dict[str, Any] | None) -> dict[str, Any]:
    config = {"method": method, "num_speculative_tokens": 4, **(given or {})}
    if config["method"] != method:
        raise ConfigurationError(
            f"--speculative-config names the method '{config['method']}', the command checks '{method}'"
        )
    return config
