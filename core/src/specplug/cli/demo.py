"""`specplug demo`: compares the installed speculators with plain decoding, on the embedded model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from specplug.cli.list import NOTHING_INSTALLED
from specplug.cli.terminal import Terminal
from specplug.errors import PluginError, did_you_mean
from specplug.plugins.finder import PluginRecord, find_plugins

if TYPE_CHECKING:
    from collections.abc import Sequence

_INTRO = """\
specplug speeds up language models: a plugin drafts the next tokens, the model
verifies them in one step and keeps those that it would have generated itself.
"""
_NONE_STARTED = "No installed speculator could be shown. See why with: specplug list -v --check"


@click.command(short_help="Try the installed speculators on a small model.")
@click.option(
    "--method", "methods", metavar="NAME", multiple=True, help="Show this speculator. Repeatable. [default: all]"
)
@click.option("--max-tokens", type=click.IntRange(min=2), help="Maximum number of tokens of each output.")
@click.option(
    "--num-speculative-tokens", type=click.IntRange(min=1), default=5, show_default=True, help="Draft length."
)
@click.pass_context
def demo(ctx: click.Context, methods: tuple[str, ...], max_tokens: int | None, num_speculative_tokens: int) -> None:
    """Show what the installed speculators do, on the small model that comes with specplug.

    Three prompts are continued by plain decoding and then with each speculator; the exit status is 1 if any output
    differs. Runs offline, in well under a minute.

    \b
    Examples:
      specplug demo
      specplug demo --method ngram --max-tokens 40
    """  # noqa: D301
    records = find_plugins()
    chosen = [_usable(method, records) for method in dict.fromkeys(methods)] if methods else records
    terminal = Terminal.out()
    terminal.line(_INTRO)

    from specplug.cli.run.demo import run_demo
    from specplug.cli.views.demo import show_ending, show_results

    results = run_demo(terminal, chosen, max_tokens, num_speculative_tokens, skip_failed=not methods)
    all_identical = show_results(terminal, results)
    show_ending(terminal, results, all_identical, _NONE_STARTED if records else NOTHING_INSTALLED)
    if not all_identical:
        ctx.exit(1)


def _usable(method: str, records: Sequence[PluginRecord]) -> PluginRecord:
    """Returns the usable plugin of a method.

    Raises:
        PluginError: there is none.
    """
    found = [record for record in records if record.method == method]
    for record in found:
        if record.status == "ok":
            return record
    if found:
        first = found[0]
        raise PluginError(f"speculator '{method}' of package {first.distribution} is {first.status}: {first.reason}")
    names = sorted({record.method for record in records})
    near = did_you_mean(method, names)
    raise PluginError(
        f"no speculator named '{method}'{near} (installed: {', '.join(names) or 'none'}; see: specplug list)"
    )
