"""One promise of the contract, and how it can fail or not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from specplug.testing.subject import Subject

PAGE = "docs/conformance.md"


class CheckFailure(AssertionError):  # noqa: N818 - it is what came of a check, not an error of the kit
    """The speculator breaks a promise: what was expected, and what came."""

    def __init__(self, expected: str, came: str) -> None:
        super().__init__(f"expected: {expected}\n     got: {came}")
        self.expected = expected
        self.came = came


class NotApplicable(Exception):  # noqa: N818
    """The promise is none that this speculator makes; the text says why."""


@attrs.frozen
class Check:
    """One promise of the contract.

    Attributes:
        name: a short name that does not change; also the anchor in the documentation.
        title: the promise, in one line.
        proves: what a pass means, and what a failure usually comes from.
        run: raises `CheckFailure` or `NotApplicable`, or returns the evidence in one line.
    """

    name: str
    title: str
    proves: str
    run: Callable[[Subject], str]

    @property
    def anchor(self) -> str:
        """Where the documentation explains it."""
        return f"{PAGE}#{self.name}"


def expect(condition: bool, expected: str, came: str) -> None:
    """Raises `CheckFailure` unless the condition holds."""
    if not condition:
        raise CheckFailure(expected, came)
