"""`specplug new`: a package for a new speculator."""

from __future__ import annotations

from pathlib import Path

import click

from specplug.cli.terminal import Terminal
from specplug.scaffold.package import KINDS, write_package


@click.command("new", short_help="Write a package for a new speculator.")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default=KINDS[0],
    show_default=True,
    help="token: drafts from token ids. model: runs a draft model with its own KV cache.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Parent folder. [default: the current folder]",
)
def new(name: str, kind: str, out: Path) -> None:
    """Write a package that provides the method NAME and passes the conformance kit unchanged.

    NAME is the value of "method" for users: a letter, then letters, digits, - or _. The package is a new folder,
    specplug-NAME; existing files are never overwritten, and the name of an installed method is refused.

    \b
    Examples:
      specplug new bigram
      specplug new my-draft --kind model --out ~/src
    """  # noqa: D301
    folder, files = write_package(name, kind, out)
    terminal = Terminal.out()
    terminal.line(f"Wrote {folder}:")
    for file in files:
        terminal.line(f"  {file}")
    terminal.line()
    terminal.line("Next:")
    terminal.line(f"  cd {folder}")
    terminal.line("  pip install --editable '.[test]'")
    terminal.line("  pytest")
    keys = "" if kind == "token" else """ --target tiny --speculative-config '{"model": "tiny"}'"""
    terminal.line(f"  specplug list && specplug check {_method(name)}{keys}")


def _method(name: str) -> str:
    return name.lower().replace("-", "_")
