"""`specplug demo`: the installed speculators on the embedded model, beside plain decoding."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import attrs
import click

from specplug.cli.demo_prompts import PROMPTS, DemoPrompt
from specplug.cli.demo_result import PLAIN, heading, show_ending, show_results
from specplug.cli.demo_run import run_method
from specplug.cli.error_text import describe_error
from specplug.cli.libraries import import_libraries
from specplug.cli.listing import NOTHING_INSTALLED
from specplug.cli.terminal import Terminal
from specplug.errors import PluginError, did_you_mean
from specplug.plugins.finder import PluginRecord, find_plugins

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from specplug.cli.demo_run import MethodResult

_INTRO = """\
specplug makes language models write faster: a plugin drafts the next tokens,
the model checks them in one step and keeps those it would have written itself.
"""
_NONE_STARTED = "No installed speculator could be shown. See why with: specplug list -v --check"


@click.command(short_help="Try the installed speculators on a small model.")
@click.option(
    "--method", "methods", metavar="NAME", multiple=True, help="Show this speculator. Repeatable. [default: all]"
)
@click.option("--max-tokens", type=click.IntRange(min=2), help="Cut every output here.")
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
    prompts = [attrs.evolve(p, max_tokens=min(p.max_tokens, max_tokens or p.max_tokens)) for p in PROMPTS]
    _show_import(terminal)
    with _one_thread():
        results = _run_all(terminal, prompts, chosen, num_speculative_tokens, skip=not methods)
    all_identical = show_results(terminal, results)
    if_none = _NONE_STARTED if records else NOTHING_INSTALLED
    show_ending(terminal, results, all_identical, if_none)
    if not all_identical:
        ctx.exit(1)


def _usable(method: str, records: Sequence[PluginRecord]) -> PluginRecord:
    """The record of a method that was asked for.

    Raises:
        PluginError: there is none that can be used.
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


def _show_import(terminal: Terminal) -> None:
    started = time.perf_counter()
    terminal.write("Importing PyTorch and Transformers ... ")
    import_libraries()
    terminal.line(f"{time.perf_counter() - started:.1f} s")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Runs the embedded model on one thread: it is too small for more, and timings are steadier on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_all(
    terminal: Terminal,
    prompts: Sequence[DemoPrompt],
    records: Sequence[PluginRecord],
    num_speculative_tokens: int,
    *,
    skip: bool,
) -> dict[str, MethodResult]:
    """Plain decoding, then every method; one that does not start is reported, and left out if `skip`."""
    heading(terminal, "Plain decoding: the embedded model tiny alone")
    results = {PLAIN: run_method(terminal, prompts, None)}
    for record in records:
        if record.status != "ok":
            terminal.line()
            terminal.paragraph(
                f"{record.method} of {record.distribution} is left out: {record.status}, {record.reason}"
            )
            continue
        heading(terminal, f"Speculator {record.method}: package {record.distribution} {record.version}")
        config = {"method": record.method, "num_speculative_tokens": num_speculative_tokens}
        try:
            results[record.method] = run_method(terminal, prompts, config, results[PLAIN].plan)
        except Exception as error:
            if not skip:
                raise
            terminal.paragraph(f"  {record.method} is left out: {describe_error(error)}", indent="  ")
    return results
