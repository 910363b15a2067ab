"""Running checks, and their results."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Literal

import attrs

from specplug.testing.check import Check
from specplug.testing.failures import CheckFailure, FundamentalFailure, NotApplicable, NothingSeen, describe
from specplug.testing.subject import Subject

Verdict = Literal["ok", "failed", "not applicable", "nothing seen", "not run"]


@attrs.frozen
class CheckResult:
    """The result of one check.

    Attributes:
        check: which.
        verdict: `ok`, `failed`, `not applicable`, `nothing seen` where it drafted nothing that could be judged, or
            `not run` where an earlier check showed that the speculator cannot work at all.
        text: the evidence, what is wrong, or why it does not apply or was not run.
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
    """Runs one check; nothing that a speculator does gets past it. After a fundamental failure no other check is run."""
    if subject.ended_by is not None:
        return CheckResult(check, "not run", subject.ended_by, 0.0)
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
    except FundamentalFailure as failure:
        verdict, text = "failed", str(failure)
        subject.ended_by = f"'{check.name}' failed: {failure.came.splitlines()[0]}"
    except CheckFailure as failure:
        verdict, text = "failed", str(failure)
    except Exception as error:
        verdict, trace = "failed", traceback.format_exc()
        text = str(CheckFailure("that the check runs to its end", describe(error)))
    return CheckResult(check, verdict, text, time.perf_counter() - started, trace)


def run_checks(
    subject: Subject, checks: Iterable[Check], on_result: Callable[[CheckResult], None] = lambda result: None
) -> list[CheckResult]:
    """Runs checks one after the other."""
    results: list[CheckResult] = []
    for check in checks:
        result = run_check(check, subject)
        results.append(result)
        on_result(result)
    return results
