"""Every check fails for the speculator that breaks its promise, and for no other; good ones pass all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from broken import BROKEN, GOOD, HELD, Case

from specplug.testing import CHECKS, CheckResult, Subject, Targets, run_checks, tiny_draft

NEIGHBOURS = {"startup", "validity", "counters"}  # all checks for all of them take minutes


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    """The same targets for all."""
    return Targets(tmp_path_factory.mktemp("targets"))


@pytest.fixture(autouse=True)
def forget_what_was_held() -> Iterator[None]:
    HELD[:] = [None]
    yield
    HELD.clear()


def check(case: Case, targets: Targets, names: set[str] | None = None) -> list[CheckResult]:
    def config(folder: Path) -> dict[str, object]:
        keys = {"draft": str(tiny_draft(folder))} if "_model" in getattr(case.plugin, "__qualname__", "") else {}
        return {"method": "mine", "num_speculative_tokens": 4, **keys}

    subject = Subject(
        make_config=config,
        targets=targets,
        plugins={"mine": case.plugin},
        flags=case.flags,
        make_perfect=config if case.perfect else lambda folder: None,
        architectures=("llama",),
        quick=True,
    )
    return run_checks(subject, [c for c in CHECKS if names is None or c.name in names])


@pytest.mark.parametrize("name", list(GOOD))
def test_good_speculators_pass_all(targets: Targets, name: str) -> None:
    results = check(GOOD[name], targets)
    assert [(r.check.name, r.text, r.traceback) for r in results if r.verdict == "failed"] == []


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_promise_is_noticed(targets: Targets, name: str) -> None:
    case = BROKEN[name]
    results = check(case, targets, NEIGHBOURS | case.caught_by)
    failed = {result.check.name: result for result in results if result.verdict == "failed"}
    assert failed.keys() == case.caught_by, {name: result.text for name, result in failed.items()}
    for result in failed.values():
        assert result.traceback is None or result.check.name == "startup", result.traceback
        assert "expected: " in result.text
        assert "got: " in result.text


def test_every_check_is_provoked() -> None:
    assert {name for case in BROKEN.values() for name in case.caught_by} == {each.name for each in CHECKS}
