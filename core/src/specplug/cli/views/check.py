"""The results of `specplug check`: a line for each check, and the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from specplug.plugins.finder import find_plugins

if TYPE_CHECKING:
    from specplug.cli.terminal import Terminal
    from specplug.testing.check import Check
    from specplug.testing.runner import CheckResult

_STYLES = {"ok": "green", "failed": "red", "not applicable": "dim", "nothing seen": "yellow", "not run": "dim"}
_VERDICT_WIDTH = len("not applicable")


@attrs.define(eq=False)
class CheckReport:
    """The results of a run of the conformance kit.

    Attributes:
        method: of the speculator.
        package: the distribution that provides it.
        version: of the distribution.
        target: the model it was checked with; None for the models of the kit.
        kit: all checks that make a method conformant.
        results: of the checks that were run.
        width: of the column of names.
        overrides_verify: whether the method verifies by a rule of its own.
    """

    method: str
    package: str
    version: str
    target: str | None
    kit: tuple[Check, ...]
    results: list[CheckResult] = attrs.field(factory=list)
    width: int = 0
    overrides_verify: bool = False

    @classmethod
    def begin(cls, method: str, target: str | None, kit: tuple[Check, ...]) -> CheckReport:
        """Creates a report without results."""
        record = next((each for each in find_plugins() if each.method == method and each.status == "ok"), None)
        return cls(method, record.distribution if record else "?", record.version if record else "?", target, kit)

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return self._named("failed")

    @property
    def unseen(self) -> list[str]:
        """The names of the checks that saw no draft to judge."""
        return self._named("nothing seen")

    @property
    def is_complete(self) -> bool:
        """Whether every check of the kit ran."""
        return {result.check.name for result in self.results if result.verdict != "not run"} >= {
            check.name for check in self.kit
        }

    @property
    def is_conformant(self) -> bool | None:
        """Whether every check ran and none failed; None if none failed, but some did not run or saw nothing."""
        if self.failed:
            return False
        return True if self.is_complete and not self.unseen else None

    @property
    def summary(self) -> str:
        """The last line."""
        if self.failed:
            verdict = f"not conformant: {', '.join(self.failed)}"
        elif self.is_conformant:
            verdict = "conformant"
        else:
            parts = []
            if not self.is_complete:
                parts.append(f"only {len(self.results)} of {len(self.kit)} checks were run; none failed")
            if self.unseen:
                parts.append(f"these checks saw no draft to judge: {', '.join(self.unseen)}")
            verdict = "; ".join(parts)
        if self.overrides_verify:
            verdict += "; it verifies by a rule of its own, which specplug does not check"
        return f"{self.method} ({self.package} {self.version}): {verdict}"

    def _named(self, verdict: str) -> list[str]:
        return [result.check.name for result in self.results if result.verdict == verdict]

    def show_header(self, out: Terminal) -> None:
        """Prints the names of the columns."""
        out.line(f"{'CHECK':<{self.width}}  {'VERDICT':<{_VERDICT_WIDTH}}  SECONDS  EVIDENCE", "bold")

    def add(self, result: CheckResult, out: Terminal | None) -> None:
        """Adds a result, and prints it to `out`, if there is one."""
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
            out.line(f"         see: {result.check.see}")

    def show_summary(self, out: Terminal) -> None:
        """Prints the last line."""
        out.line()
        out.line(self.summary, "red" if self.failed else "green" if self.is_conformant else "yellow")

    def as_json(self) -> dict[str, Any]:
        """Returns the object of `specplug check --json`; keys are only added, never removed."""
        return {
            "method": self.method,
            "package": self.package,
            "version": self.version,
            "target": self.target,
            "conformant": self.is_conformant,
            "complete": self.is_complete,
            "failed": self.failed,
            "nothing_seen": self.unseen,
            "overrides_verify": self.overrides_verify,
            "checks": [result.as_json() for result in self.results],
        }
