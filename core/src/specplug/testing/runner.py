"""Running checks, and what came of each."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Literal

import attrs

from specplug.testing.check import Check, CheckFailure, NotApplicable, NothingSeen
from specplug.testing.subject import Subject

Verdict = Literal["ok", "failed", "not applicable", "nothing seen"]


@attrs.frozen
class CheckResult:
    """What came of one check.

    Attributes:
        check: which.
        verdict: `ok`, `failed`, `not applicable`, or `nothing seen` where it drafted nothing that could be judged.
        text: the evidence, what is wrong, or why it does not apply.
        seconds: how long it took.
        traceback: of an error that the check did not expect; it counts as failed.
    """

    check: Check
    verdict: Verdict
    text: str
    seconds: float
    traceback: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The object of `specplug check --json`. Keys are only ever added."""
        return {
            "check": self.check.name,
            "title": self.check.title,
            "verdict": self.verdict,
            "text": self.text,
            "seconds": round(self.seconds, 3),
            "see": self.check.see,
            "traceback": self.traceback,
        }


def run_check(check: Check, subject: Subject) -> CheckResult:
    """Runs one check; nothing that a speculator does gets past it."""
    started = time.perf_counter()
    trace = None
    verdict: Verdict = "ok"
    try:
        text = check.run(subject)
    except NotApplicable as reason:
        verdict, text = "not applicable", str(reason)
    except NothingSeen as reason:
        if subject.flags.drafts:
            verdict, text = "failed", str(CheckFailure("that it drafts, as its flags say", str(reason)))
        else:
            verdict, text = "nothing seen", str(reason)
    except CheckFailure as failure:
        verdict, text = "failed", str(failure)
    except Exception as error:
        verdict, trace = "failed", traceback.format_exc()
        text = str(CheckFailure("that the check runs to its end", f"{type(error).__name__}: {error}"))
    return CheckResult(check, verdict, text, time.perf_counter() - started, trace)


def run_checks(
    subject: Subject, checks: Iterable[Check], on_result: Callable[[CheckResult], None] = lambda result: None
) -> list[CheckResult]:
    """Runs checks one after the other. Where the first, `startup`, fails, no other can run."""
    results: list[CheckResult] = []
    for check in checks:
        if results and results[0].check.name == "startup" and results[0].verdict == "failed":
            result = CheckResult(check, "not applicable", "the engine does not start", 0.0)
        else:
            result = run_check(check, subject)
        results.append(result)
        on_result(result)
    return results
