"""`specplug check`."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from fake_plugins import install, specplug

OVER = """
from specplug import Proposal, hookimpl

class Over:
    @hookimpl
    def propose(self, batch):
        return Proposal([[5] * 9 for row in batch.rows])

@hookimpl
def load_speculator(config, target):
    return Over()
"""
NEEDY = """
from specplug import ConfigurationError, hookimpl

@hookimpl
def load_speculator(config, target):
    if config.get("model") is None:
        raise ConfigurationError("method 'needy' needs the key 'model'")
"""
OBSERVER = """
from specplug import hookimpl

@hookimpl(wrapper=True)
def propose(batch):
    return (yield)
"""


def test_a_part_of_the_kit_does_not_make_a_method_conformant(tmp_path: Path) -> None:
    path = install(tmp_path, "specplug-fake", methods={"fake": ""})
    result = specplug("check", "fake", "--quick", "--only", "budgets", "--only", "tokens", path=path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["CHECK", "VERDICT", "SECONDS", "EVIDENCE"]
    assert [line.split()[:2] for line in lines[1:4]] == [["startup", "ok"], ["budgets", "ok"], ["tokens", "ok"]]
    assert lines[-1] == "fake (specplug-fake 1.2): only 3 of 24 checks were run; none failed"
    assert result.stderr == ""


def test_a_method_that_fails(tmp_path: Path) -> None:
    path = install(tmp_path, "specplug-over", methods={"over": ""}, source=OVER)
    result = specplug("check", "over", "--quick", "--only", "budgets", path=path)
    assert result.returncode == 1
    assert "expected: at most row.budget.max_nodes nodes" in result.stdout
    assert "got: " in result.stdout
    assert "see: specplug check --explain budgets" in result.stdout
    assert result.stdout.splitlines()[-1] == "over (specplug-over 1.2): not conformant: budgets"


def test_json_is_one_object(tmp_path: Path) -> None:
    path = install(tmp_path, "specplug-over", methods={"over": ""}, source="print('hello')\n" + OVER)
    result = specplug("check", "over", "--quick", "--json", "--only", "budgets", "--only", "perfect", path=path)
    assert result.returncode == 1
    report = json.loads(result.stdout)
    checks = report.pop("checks")
    assert report == {
        "method": "over",
        "package": "specplug-over",
        "version": "1.2",
        "target": None,
        "conformant": False,
        "complete": False,
        "failed": ["budgets"],
        "nothing_seen": [],
        "overrides_verify": False,
    }
    assert [(each["check"], each["verdict"]) for each in checks] == [
        ("startup", "ok"),
        ("budgets", "failed"),
        ("perfect", "not applicable"),
    ]
    assert set(checks[0]) == {"check", "title", "verdict", "text", "seconds", "see", "traceback"}


def test_a_given_target_and_an_observer(tmp_path: Path) -> None:
    path = install(tmp_path, "specplug-looker", methods={"looker": ""}, source=OBSERVER, group="specplug.observers")
    result = specplug("check", "looker", "--target", "tiny", "--quick", "--only", "wrappers", path=path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "unchanged by wrappers of propose" in result.stdout
    assert result.stdout.splitlines()[-1] == "looker (specplug-looker 1.2): only 2 of 6 checks were run; none failed"


def test_another_packages_wrapper_is_not_blamed_on_the_method(tmp_path: Path) -> None:
    raising = OBSERVER.replace("return (yield)", "yield\n    raise RuntimeError('of another package')")
    install(tmp_path, "specplug-looker", methods={"looker": ""}, source=raising, group="specplug.observers")
    path = install(tmp_path, "specplug-fake", methods={"fake": ""})
    result = specplug("check", "fake", "--quick", "--only", "validity", "--only", "wrappers", path=path)
    assert result.returncode == 0, result.stdout
    assert "no plugin here wraps propose or verify" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["needy"],
            "needs the key 'model' (give its keys with --speculative-config, and the model that they are for with "
            "--target",
        ),
        (["needdy"], "no speculator named 'needdy'; did you mean 'needy'?"),
        (["needy", "--only", "budget"], "no check named 'budget'; did you mean 'budgets'? (checks: startup, "),
        (["needy", "--speculative-config", '{"method": "x"}'], "has the method 'x', but the command checks 'needy'"),
        (["needy", "--speculative-config", "{"], "not valid JSON"),
        (["needy", "--target", "./nowhere"], "'./nowhere' is not a folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], text: str) -> None:
    path = install(tmp_path, "specplug-needy", methods={"needy": ""}, source=NEEDY)
    result = specplug("check", *arguments, path=path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_only_the_whole_kit_makes_a_method_conformant() -> None:
    from specplug.cli.views.check import CheckReport
    from specplug.testing import CHECKS, CheckResult

    results = [CheckResult(check=check, verdict="ok", text="", seconds=0.0) for check in CHECKS]
    unseen = attrs.evolve(results[-1], verdict="nothing seen")
    whole = CheckReport("m", "p", "1", None, CHECKS, results)
    part = CheckReport("m", "p", "1", None, CHECKS, results[:-1])
    quiet = CheckReport("m", "p", "1", None, CHECKS, [*results[:-1], unseen])
    assert (whole.is_conformant, whole.summary) == (True, "m (p 1): conformant")
    assert part.as_json()["conformant"] is None
    assert quiet.as_json()["conformant"] is None
    assert quiet.summary == f"m (p 1): these checks saw no draft to judge: {CHECKS[-1].name}"


def test_a_part_of_the_kit_leaves_it_open_whether_a_method_is_conformant(tmp_path: Path) -> None:
    path = install(tmp_path, "specplug-fake", methods={"fake": ""})
    result = specplug("check", "fake", "--quick", "--only", "startup", "--json", path=path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["conformant"], report["complete"], report["failed"]) == (None, False, [])


def test_what_a_message_refers_to_is_at_hand() -> None:
    from specplug.testing import CHECKS

    for check in (CHECKS[0], CHECKS[-1]):
        arguments = check.see.split()[1:]
        result = specplug(*arguments)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == check.explanation.replace("**", "")
    result = specplug("check", "--explain", "budget")
    assert result.returncode == 1
    assert "no check named 'budget'; did you mean 'budgets'?" in result.stderr
