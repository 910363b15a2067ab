"""`specplug check`."""

from __future__ import annotations

import json
from pathlib import Path

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
    assert lines[-1] == "fake (specplug-fake 1.2): the 3 checks that were chosen found nothing"
    assert result.stderr == ""


def test_a_method_that_fails(tmp_path: Path) -> None:
    path = install(tmp_path, "specplug-over", methods={"over": ""}, source=OVER)
    result = specplug("check", "over", "--quick", "--only", "budgets", path=path)
    assert result.returncode == 1
    assert "expected: at most row.budget.max_nodes nodes" in result.stdout
    assert "got: " in result.stdout
    assert "see: docs/conformance.md#budgets" in result.stdout
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
        "failed": ["budgets"],
        "overrides_verify": False,
    }
    assert [(each["check"], each["verdict"]) for each in checks] == [
        ("startup", "ok"),
        ("budgets", "failed"),
        ("perfect", "not applicable"),
    ]
    assert set(checks[0]) == {"check", "title", "verdict", "text", "seconds", "see", "traceback"}


def test_a_given_target_and_an_observer(tmp_path: Path) -> None:
    path = install(tmp_path, "specplug-looker", methods={"looker": ""}, source=OBSERVER)
    result = specplug("check", "looker", "--target", "tiny", "--quick", "--only", "wrappers", path=path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "unchanged by wrappers of propose" in result.stdout
    assert result.stdout.splitlines()[-1] == "looker (specplug-looker 1.2): the 2 checks that were chosen found nothing"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["needy"], "needs the key 'model' (give its keys with --speculative-config, and with --target"),
        (["needdy"], "no speculator named 'needdy'; did you mean 'needy'?"),
        (["needy", "--only", "budget"], "no check named 'budget'; did you mean 'budgets'? (checks: startup, "),
        (["needy", "--speculative-config", '{"method": "x"}'], "names the method 'x', the command checks 'needy'"),
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
    from specplug.cli.check_report import CheckReport
    from specplug.testing import CHECKS, CheckResult

    results = [CheckResult(check=check, verdict="ok", text="", seconds=0.0) for check in CHECKS]
    whole = CheckReport("m", "p", "1", None, results)
    part = CheckReport("m", "p", "1", None, results[:-1])
    assert (whole.is_conformant, whole.summary) == (True, "m (p 1): conformant")
    assert (part.is_conformant, part.as_json()["conformant"]) == (False, False)
