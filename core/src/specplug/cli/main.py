"""The command `specplug`: its subcommands, and the handling of their errors."""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
import warnings
from typing import TYPE_CHECKING, Any

import click

from specplug.cli.bench import bench
from specplug.cli.chat import chat
from specplug.cli.check import check
from specplug.cli.demo import demo
from specplug.cli.error_text import describe_error, hint_at_details
from specplug.cli.generate import generate
from specplug.cli.integrations.vllm_config import vllm_config
from specplug.cli.list import list_command
from specplug.cli.new import new
from specplug.cli.plan import plan
from specplug.cli.process import INTERRUPTED, insistent_interrupts, open_streams, quick_end
from specplug.cli.serve import serve
from specplug.cli.terminal import Terminal
from specplug.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class _UsageError(click.ClickException):
    """Invalid options or arguments, as one line."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Prints the line."""
        click.echo(f"specplug: error: {self.message}", err=True)


class _CommandGroup(click.Group):
    """A group that prints errors as one line; `--debug` adds the traceback."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parses the options of the group."""
        with _one_line_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the subcommand."""
        debug = bool(ctx.params.get("debug"))
        try:
            with insistent_interrupts(), _quiet_libraries(debug), _one_line_usage(ctx):
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _fail("interrupted", ctx.params["debug"])
            ctx.exit(INTERRUPTED)
        except Exception as error:
            debug = ctx.params["debug"]  # may have been set by the subcommand's own --debug
            hint = "" if debug else hint_at_details(error)
            _fail(f"error: {describe_error(error)}{hint}", debug)
            ctx.exit(1)


@contextlib.contextmanager
def _one_line_usage(group: click.Context | None = None) -> Iterator[None]:
    """Converts usage errors of click to one line; `group` knows the subcommand if the error does not."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = "specplug"
        if error.ctx is not None:
            command = error.ctx.command_path
        elif group is not None:
            command = f"{group.command_path} {group.invoked_subcommand}"
        raise _UsageError(f"{error.format_message().rstrip('.')} (see: {command} --help)") from error


def _fail(message: str, debug: bool) -> None:
    if debug:
        click.echo(traceback.format_exc(), err=True, nl=False)
    click.echo(f"specplug: {message}", err=True)


@contextlib.contextmanager
def _quiet_libraries(debug: bool) -> Iterator[None]:
    """Shows warnings of specplug as lines, and warnings of libraries only with `--debug`."""
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
            # An unfinished startup line is overwritten; it is written again when its step ends.
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


def _set_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Accepts `--debug` after the subcommand too, where people add it when they repeat a command."""
    if value:
        ctx.find_root().params["debug"] = True


for _command in (bench, chat, check, demo, generate, list_command, new, plan, serve, vllm_config):
    _command.params.append(
        click.Option(["--debug"], is_flag=True, hidden=True, expose_value=False, callback=_set_debug)
    )
    cli.add_command(_command)


def main() -> None:
    """The entry point."""
    open_streams()
    with quick_end():
        cli(prog_name="specplug")


if __name__ == "__main__":
    main()
