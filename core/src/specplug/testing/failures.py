"""How a check of the kit ends: a failure, not applicable, or nothing seen; and the texts of failures."""

from __future__ import annotations

import traceback
from pathlib import Path

_MOST_LINES = 4
_MOST_CHARACTERS = 600
_NOT_ITS_OWN = (str(Path(__file__).parents[1]), "/site-packages/torch/", "/site-packages/transformers/", "/pluggy/")


class CheckFailure(AssertionError):  # noqa: N818 - the result of a check, not an error of the kit
    """The speculator breaks a promise: what was expected, and what was observed."""

    def __init__(self, expected: str, came: str) -> None:
        came = _shortened(came)
        super().__init__(f"expected: {expected}\n     got: {came}")
        self.expected = expected
        self.came = came


class FundamentalFailure(CheckFailure):
    """The speculator cannot work at all, so that no other check can say anything about it."""


class NotApplicable(Exception):  # noqa: N818
    """This speculator does not make the promise; the text says why."""


class NothingSeen(Exception):  # noqa: N818
    """Nothing was drafted that could have broken the promise."""


def describe(error: BaseException) -> str:
    """An error in one line: what was raised first, and the line of the plugin that raised it."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(name in frame.filename for name in _NOT_ITS_OWN)]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name})" if own else ""
    return f"{type(error).__name__}{where}: {error}"


def _shortened(text: str) -> str:
    lines = text.splitlines()
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"... and {len(lines) - _MOST_LINES} more lines"]
    short = "\n".join(lines)
    return short if len(short) <= _MOST_CHARACTERS else f"{short[:_MOST_CHARACTERS]} ..."


def expect(condition: bool, expected: str, came: str) -> None:
    """Raises `CheckFailure` unless the condition holds."""
    if not condition:
        raise CheckFailure(expected, came)


def expect_drafts(count: int) -> None:
    """Raises `NothingSeen` unless something was drafted."""
    if not count:
        raise NothingSeen("it drafted nothing here: there was nothing to judge")
