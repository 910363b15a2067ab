"""Every check fails for the speculator that breaks its promise, and for no other; good ones pass all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from broken import BROKEN, GOOD, HELD, Case

from specplug import LLM, Proposal, SpeculatorTraits, hookimpl
from specplug.testing import CHECKS, CheckResult, Flags, Subject, Targets, run_checks, tiny_draft
from support.marks import slow_except

A_FEW = (
    "a lossy sampling verify",
    "stale KV after a rollback",
    "under-planned memory",
)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_good_speculators_pass_all(targets: Targets, name: str) -> None:
    results = check(GOOD[name], targets)
    assert [(r.check.name, r.text, r.traceback) for r in results if r.verdict == "failed"] == []


@pytest.mark.parametrize("name", slow_except(BROKEN, *A_FEW))
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


class Silent:
    """Drafts nothing, so that nearly every promise holds by itself."""

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        return Proposal([[] for _ in batch.rows])


_NEED_DRAFTS = {"validity", "budgets", "greedy", "sampling", "seeds", "parameters", "endings", "counters", "streams"}


@pytest.mark.slow
def test_a_check_that_saw_no_draft_says_so(targets: Targets) -> None:
    silent = Case(lambda config, target: Silent(), set())
    results = {result.check.name: result for result in check(silent, targets)}
    unseen = {name for name, result in results.items() if result.verdict == "nothing seen"}
    assert unseen == _NEED_DRAFTS | {"rollback", "rows", "prefixes", "hosts", "progress"}
    assert all("drafted nothing" in results[name].text for name in unseen)


def test_nothing_seen_is_a_failure_for_one_that_promises_drafts(targets: Targets) -> None:
    silent = Case(lambda config, target: Silent(), set(), Flags(drafts=True))
    results = check(silent, targets, {"startup", "sampling"})
    assert [result.verdict for result in results] == ["ok", "failed"]


def test_nothing_of_other_packages_takes_part(targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper of a package that is not under test must not be blamed on what is."""
    allowed = []
    start = LLM.__init__

    def look(self: LLM, *arguments: Any, **options: Any) -> None:
        allowed.append(options["allowed_plugins"])
        start(self, *arguments, **options)

    monkeypatch.setattr(LLM, "__init__", look)
    lookup = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_speculative_tokens": 3}
    fallback = {"method": "draft_model", "model": str(tiny_draft(targets.get()))}
    for config, expected in ((lookup, ("specplug-ngram",)), (lookup | {"fallback": fallback}, _BOTH)):
        subject = Subject(make_config=lambda folder, config=config: config, targets=targets)
        with subject.start(targets.get()):
            assert allowed.pop() == expected
        with subject.plain(targets.get()):
            assert allowed.pop() == ()


_BOTH = ("specplug-draft-model", "specplug-ngram")


def test_traits_cannot_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="token_only=True and learns=True"):
        SpeculatorTraits(token_only=True, learns=True)
