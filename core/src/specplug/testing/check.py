"""One promise of the contract."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from specplug.testing.subject import Subject


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
