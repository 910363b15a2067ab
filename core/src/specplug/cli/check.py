"""`specplug check`: runs the conformance kit on an installed speculator."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import click

from specplug.cli.inputs import read_speculative_config
from specplug.cli.process import check_plugins, import_libraries
from specplug.cli.terminal import Terminal
from specplug.cli.views.check import CheckReport
from specplug.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator


def _explain(ctx: click.Context, option: click.Parameter, name: str | None) -> None:
    if name is None or ctx.resilient_parsing:
        return
    import_libraries()
    from specplug.cli.run.check import find_check

    Terminal.out().paragraph(find_check(name).explanation.replace("**", ""))
    ctx.exit()


@click.command("check", short_help="Check that a speculator follows the contract.")
@click.argument("method")
@click.option("--target", metavar="MODEL", help="Use this folder, hub name or tiny. [default: small random models]")
@click.option(
    "--speculative-config",
    metavar="JSON",
    help="The keys of the method, or a file with them; required if the method requires keys.",
)
@click.option("--only", metavar="CHECK", multiple=True, help="Run only startup and this check. Repeatable.")
@click.option("--quick", is_flag=True, help="Fewer trials and targets.")
@click.option(
    "--explain",
    metavar="CHECK",
    is_eager=True,
    expose_value=False,
    callback=_explain,
    help="Explain a check and where to look when it fails; run nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; its keys are stable.")
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

    The result of a check is ok, failed, not applicable, or nothing seen (there was no draft to judge); after a fatal fault
    the remaining checks are not run. The exit status is 1 if any check failed. Without --target, the kit creates small
    random models of several architectures; a method with a draft model or head needs the target that these were made
    for. An observer is checked with a small speculator of the kit.

    \b
    Examples:
      specplug check ngram
      specplug check draft_model --target tiny --quick
      specplug check mine --speculative-config '{"window": 3}' --json
      specplug check --explain budgets
    """  # noqa: D301
    from specplug.config.engine import EngineConfig
    from specplug.plugins.finder import find_plugins

    config = _method_config(method, read_speculative_config(speculative_config))
    out = Terminal.out()
    with contextlib.redirect_stdout(sys.stderr):  # plugins may print; standard output gets only the results
        if not any(record.method == method and record.kind == "observer" for record in find_plugins()):
            with _hint_at_keys(has_target=target is not None):
                check_plugins(EngineConfig.create(target or "tiny", speculative_config=config))
        import_libraries()
        from specplug.cli.run.check import choose_checks, make_subject, preflight, whole_kit
        from specplug.testing.runner import run_checks

        with tempfile.TemporaryDirectory(prefix="specplug-check-") as root:
            subject, is_observer = make_subject(root, method, config, target, quick=quick)
            checks = choose_checks(only, is_observer=is_observer)
            report = CheckReport.begin(method, target, whole_kit(is_observer=is_observer))
            with _hint_at_keys(has_target=target is not None):
                report.overrides_verify = preflight(subject, method)
            report.width = max(len(check.name) for check in checks)
            if not as_json:
                report.show_header(out)
            run_checks(subject, checks, lambda result: report.add(result, None if as_json else out))
    if as_json:
        out.line(json.dumps(report.as_json(), indent=2))
    else:
        report.show_summary(out)
    if report.failed:
        ctx.exit(1)


@contextlib.contextmanager
def _hint_at_keys(*, has_target: bool) -> Iterator[None]:
    """Adds to configuration errors how to give a method the keys that it needs."""
    try:
        yield
    except ConfigurationError as error:
        hint = "give its keys with --speculative-config"
        if not has_target:
            hint += ", and the model that they are for with --target (without it, the kit creates small random models)"
        error.add_note(hint)
        raise


def _method_config(method: str, given: dict[str, Any] | None) -> dict[str, Any]:
    config = {"method": method, "num_speculative_tokens": 4, **(given or {})}
    if config["method"] != method:
        raise ConfigurationError(
            f"--speculative-config has the method '{config['method']}', but the command checks '{method}'"
        )
    return config
