"""The command `specplug`: its subcommands, and what becomes of their errors."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Any

import click

from specplug.cli.demo import demo
from specplug.cli.error_text import describe_error
from specplug.cli.generate import generate
from specplug.cli.listing import list_command
from specplug.cli.terminal import Terminal
from specplug.errors import SpecplugError
from specplug.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

_INTERRUPTED = 130
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class _CommandGroup(click.Group):
    """A group whose errors are one line each: a traceback is for those who ask for it with `--debug`."""

    def invoke(self, ctx: click.Context) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            with _quiet_libraries(debug):
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _fail("interrupted", debug)
            ctx.exit(_INTERRUPTED)
        except Exception as error:
            expected = isinstance(error, SpecplugError) or debug
            hint = "" if expected else " (run again with --debug for a traceback: specplug --debug ...)"
            _fail(f"error: {describe_error(error)}{hint}", debug)
            ctx.exit(1)


def _fail(message: str, debug: bool) -> None:
    if debug:
        click.echo(traceback.format_exc(), err=True, nl=False)
    click.echo(f"specplug: {message}", err=True)


@contextlib.contextmanager
def _quiet_libraries(debug: bool) -> Iterator[None]:
    """Shows specplug's own warnings as lines, and those of libraries only with `--debug`."""
    logger = logging.getLogger("specplug")
    handler = _WarningHandler(logging.WARNING)
    handler.setFormatter(_OneLineFormatter(debug))
    was_propagating, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if not debug:
                for name, value in _QUIET.items():
                    os.environ.setdefault(name, value)
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = was_propagating


class _WarningHandler(logging.Handler):
    """Writes each warning once to standard error."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = f"specplug: {record.levelname.lower()}: {self.format(record)}"
        if text not in self._seen:
            self._seen.add(text)
            # A startup line that is still open is written over; it is written again when its step ends.
            Terminal.err().rewind()
            click.echo(text, err=True)


class _OneLineFormatter(logging.Formatter):
    def __init__(self, debug: bool) -> None:
        super().__init__("%(message)s")
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record) if self._debug else " ".join(record.getMessage().split())


@click.group(cls=_CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="specplug", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks and the warnings of libraries.")
def cli(debug: bool) -> None:
    """Speculative decoding for Hugging Face models; every method is a plugin.

    \b
    Example:
      specplug demo
    """  # noqa: D301
    del debug  # read by _CommandGroup, which wraps the subcommand


cli.add_command(demo)
cli.add_command(generate)
cli.add_command(list_command)


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    cli(prog_name="specplug")


if __name__ == "__main__":
    main()
