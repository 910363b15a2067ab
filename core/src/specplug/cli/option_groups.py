"""Options of a command in named groups, so that a long help text can be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class GroupedOption(click.Option):
    """An option that the help text lists under a group's name.

    Args:
        group: the name; empty for the options that come last.
        arguments: those of `click.Option`.
    """

    def __init__(self, *arguments: Any, group: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help text has one section for each group of options, in the order they were given."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the sections."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(parameter, "group", ""), []).append(record)
        rest = groups.pop("", [])
        for name, records in (*groups.items(), ("Other", rest)):
            if records:
                with formatter.section(f"{name} options"):
                    formatter.write_dl(records)


def option_group(name: str, *options: tuple[tuple[str, ...], dict[str, Any]]) -> Callable[[Command], Command]:
    """A decorator that gives a command several options.

    Args:
        name: the group's.
        options: each as `named(...)` returns it.
    """

    def apply(command: Command) -> Command:
        for names, details in reversed(options):
            command = click.option(*names, cls=GroupedOption, group=name, **details)(command)
        return command

    return apply


def named(*names: str, **details: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """An option for `option_group`; the arguments are those of `click.option`."""
    return names, details
