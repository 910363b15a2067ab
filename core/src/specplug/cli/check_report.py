"""Verdicts as they come, and the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from specplug.plugins.finder import find_plugins

if TYPE_CHECKING:
    from specplug.cli.terminal import Terminal
    from specplug.testing.runner import CheckResult

_STYLES = {"ok": "green", "failed": "red", "not applicable": "dim"}
_VERDICT_WIDTH = len("not applicable")


@attrs.define(eq=False)
class CheckReport:
    """What came of a run of the kit.

    Attributes:
        method: the speculator's.
        package: the distribution that brings it.
        version: of the distribution.
        target: the model it was checked on; None for the kit's own.
        results: of every check.
        width: of the column of names.
        overrides_verify: whether the method verifies by a rule of its own.
    """

    method: str
    package: str
    version: str
    target: str | None
    results: list[CheckResult] = attrs.field(factory=list)
    width: int = 0
    overrides_verify: bool = False

    @classmethod
    def begin(cls, method: str, target: str | None) -> CheckReport:
        """A report without results."""
        record = next((each for each in find_plugins() if each.method == method and each.status == "ok"), None)
        return cls(method, record.distribution if record else "?", record.version if record else "?", target)

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [result.check.name for result in self.results if result.verdict == "failed"]

    @property
    def is_conformant(self) -> bool:
        """Whether every check of the kit ran and none failed."""
        return not self.failed and self._is_complete

    @property
    def _is_complete(self) -> bool:
        from specplug.testing.checks import CHECKS

        return {result.check.name for result in self.results} == {check.name for check in CHECKS}

    @property
    def summary(self) -> str:
        """The last line."""
        if self.failed:
            verdict = f"not conformant: {', '.join(self.failed)}"
        else:
            verdict = (
                "conformant" if self._is_complete else f"the {len(self.results)} checks that were chosen found nothing"
            )
        if self.overrides_verify:
            verdict += "; it verifies by a rule of its own, which core does not check"
        return f"{self.method} ({self.package} {self.version}): {verdict}"

    def show_header(self, out: Terminal) -> None:
        """The names of the columns."""
        out.line(f"{'CHECK':<{self.width}}  {'VERDICT':<{_VERDICT_WIDTH}}  SECONDS  EVIDENCE", "bold")

    def add(self, result: CheckResult, out: Terminal | None) -> None:
        """Adds a result, and shows it."""
        self.results.append(result)
        if out is None:
            return
        failed = result.verdict == "failed"
        out.write(f"{result.check.name:<{self.width}}  ")
        out.write(f"{result.verdict:<{_VERDICT_WIDTH}}", _STYLES[result.verdict])
        indent = " " * (self.width + _VERDICT_WIDTH + 13)
        out.paragraph(f"  {result.seconds:7.1f}  {result.check.title if failed else result.text}", indent=indent)
        if failed:
            for line in result.text.splitlines():
                out.paragraph(f"    {line}", indent=" " * 14)
            out.line(f"         see: {result.check.anchor}")
            if result.traceback:
                out.line("\n".join(f"      {line}" for line in result.traceback.splitlines()[-8:]), "dim")

    def show_summary(self, out: Terminal) -> None:
        """The last line."""
        out.line()
        out.line(self.summary, "red" if self.failed else "green")

    def as_json(self) -> dict[str, Any]:
        """The object of `specplug check --json`. Keys are only ever added."""
        return {
            "method": self.method,
            "package": self.package,
            "version": self.version,
            "target": self.target,
            "conformant": self.is_conformant,
            "failed": self.failed,
            "overrides_verify": self.overrides_verify,
            "checks": [result.as_json() for result in self.results],
        }
