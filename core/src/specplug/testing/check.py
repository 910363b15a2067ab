"""One promise of the contract, and how it can fail or not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from specplug.testing.subject import Subject


class CheckFailure(AssertionError):  # noqa: N818 - it is what came of a check, not an error of the kit
    """The speculator breaks a promise: what was expected, and what came."""

    def __init__(self, expected: str, came: str) -> None:
        super().__init__(f"expected: {expected}\n     got: {came}")
        self.expected = expected
        self.came = came


class NotApplicable(Exception):  # noqa: N818
    """The promise is none that this speculator makes; the text says why."""


class NothingSeen(Exception):  # noqa: N818
    """Nothing came that could have broken the promise: the speculator drafted nothing here."""


@attrs.frozen
class Check:
    """One promise of the contract.

    Attributes:
        name: a short name that does not change; also the anchor in the documentation.
        title: the promise, in one line.
        proves: what a pass means, or what a failure costs.
        advice: where to look when it fails.
        run: raises `CheckFailure`, `NotApplicable` or `NothingSeen`, or returns the evidence in one line.
    """

    name: str
    title: str
    proves: str
    advice: str
    run: Callable[[Subject], str]

    @property
    def explanation(self) -> str:
        """Title, meaning and advice, as the documentation's section has them."""
        return f"**{self.title[0].upper()}{self.title[1:]}.** {self.proves} {self.advice}".rstrip()

    @property
    def see(self) -> str:
        """The command that explains it."""
        return f"specplug check --explain {self.name}"


def expect(condition: bool, expected: str, came: str) -> None:
    """Raises `CheckFailure` unless the condition holds."""
    if not condition:
        raise CheckFailure(expected, came)


def expect_drafts(count: int) -> None:
    """Raises `NothingSeen` unless something was drafted."""
    if not count:
        raise NothingSeen("it drafted nothing here: there was nothing to judge")
