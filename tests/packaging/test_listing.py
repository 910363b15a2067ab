"""`specplug list` and selection, on packages that were built and installed: none of them stops anything but itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from packages import PACKAGES

from support.environment import ROOT, Environment, build, build_wheels

PROMPT = "x = [0, 1, 0, 1, 0, 1,"
GENERATE = ("generate", "tiny", "--prompt", PROMPT, "--max-tokens", "16", "--temperature", "0")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Core and all packages, from wheels; of one, an installed file is damaged afterwards."""
    environment = Environment(tmp_path_factory.mktemp("listing"))
    projects = [package.write(environment.root / "src") for package in PACKAGES]
    wheels = [build(ROOT / "core"), *build_wheels(environment.root / "wheels", *projects)]
    environment.pip("install", "--quiet", "--no-deps", *map(str, wheels))
    (environment.site / "acme_damaged-1.0.dist-info/METADATA").unlink()
    return environment


@pytest.fixture(scope="module")
def plain(installed: Environment) -> str:
    """What plain decoding prints with no plugin allowed."""
    done = installed.specplug(*GENERATE, SPECPLUG_ALLOW_PLUGINS="none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return done.stdout


def by_package(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["package"]: record for record in records}


def speculative(method: str) -> tuple[str, ...]:
    return (*GENERATE, "--stats", "--speculative-config", json.dumps({"method": method, "num_speculative_tokens": 3}))


def test_core_brings_the_playground(installed: Environment) -> None:
    """Files that are not Python are in the wheel too."""
    folder = "specplug/server/playground"
    brought = {path.name: path.read_bytes() for path in (installed.site / folder).iterdir()}
    assert brought == {path.name: path.read_bytes() for path in (ROOT / "core/src" / folder).iterdir()}
    assert "index.html" in brought


def test_metadata_alone_tells_what_can_be_loaded(installed: Environment) -> None:
    done = installed.specplug("list")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].split() == ["METHOD", "PACKAGE", "VERSION", "STATUS", "SUMMARY"]
    found = by_package(installed.listed("--deny", "acme-good"))
    assert {name.removeprefix("acme-"): record["status"] for name, record in found.items()} == {
        "good": "blocked",
        "object": "ok",
        "lossy": "ok",
        "missing": "ok",
        "exits": "ok",
        "panics": "ok",
        "signature": "ok",
        "misspelt": "ok",
        "hookless": "ok",
        "observer": "ok",
        "liar": "ok",
        "hijacker": "ok",
        "vandal": "ok",
        "old": "incompatible",
        "future": "incompatible",
        "twin-a": "ambiguous",
        "twin-b": "ambiguous",
        "damaged": "failed",
    }
    assert found["acme-old"]["reason"].startswith("needs specplug<0.1, this is specplug 0.")
    assert found["acme-future"]["reason"].startswith("needs specplug>=99, this is specplug 0.")
    assert found["acme-twin-a"]["reason"].startswith("2 packages provide 'twin': acme-twin-a, acme-twin-b")
    assert "its metadata cannot be read" in found["acme-damaged"]["reason"]
    assert found["acme-good"]["reason"] == "on the deny-list"


def test_verbose_shows_entry_point_location_requirement_and_reason(installed: Environment) -> None:
    text = installed.specplug("list", "-v").stdout
    for line in (
        "entry point   good = acme_good",
        "entry point   object = acme_object:plugin",
        f"location      {installed.site}",
        "requires      specplug>=99",
        "incompatible  needs specplug>=99",
        "ambiguous     2 packages provide 'twin'",
    ):
        assert line in text


def test_check_loads_each_and_says_what_is_wrong(installed: Environment) -> None:
    done = installed.specplug("list", "--check", "--json")
    assert done.returncode == 1
    found = {name.removeprefix("acme-"): each for name, each in by_package(json.loads(done.stdout)).items()}
    for name in ("good", "object", "lossy"):
        assert (found[name]["status"], found[name]["hooks"]) == ("ok", ["load_speculator"])
    assert (found["observer"]["status"], found["observer"]["wraps"]) == ("ok", ["propose", "verify"])
    assert {name: each["overrides_verify"] for name, each in found.items() if each["status"] == "ok"} == {
        "good": False,
        "object": False,
        "lossy": True,
        "observer": False,
        "liar": False,
    }
    for name, reason in {
        "missing": "ModuleNotFoundError: No module named 'a_module_that_is_missing'",
        "exits": "SystemExit: 3",
        "panics": "Panic: from a native extension",
        "vandal": "its import ended the process (exit status 0)",
        "hijacker": "implements 'verify' in its module; make it a method of the object that load_speculator returns",
        "signature": "argument 'target' has a default, so it is never passed; remove it",
        "misspelt": "hook 'propse': there is no such hook; did you mean 'propose'?",
        "hookless": "implements no hook (load_speculator is needed)",
        "damaged": "its metadata cannot be read",
    }.items():
        assert found[name]["status"] == "failed"
        assert reason in found[name]["reason"]
    assert "acme_missing.py" in found["missing"]["traceback"]
    for name in ("old", "future", "twin-a", "twin-b"):
        assert (found[name]["hooks"], found[name]["traceback"]) == (None, None)


def test_check_in_words(installed: Environment) -> None:
    text = installed.specplug("list", "-v", "--check").stdout
    assert "hooks         load_speculator" in text
    assert "hooks         propose (wrapper), verify (wrapper)" in text
    assert "verify        its own (acme_lossy.Lossy): specplug does not check what it accepts" in text
    assert "      Traceback (most recent call last):" in text


@pytest.mark.parametrize(
    ("arguments", "variables", "methods"),
    [
        (("--allow", "good"), {}, {"good"}),
        (("--allow", "acme-good", "--allow", "ACME_Lossy"), {}, {"good", "lossy"}),
        (("--allow", "acme-good", "--allow", "lossy", "--deny", "good"), {}, {"lossy"}),
        ((), {"SPECPLUG_ALLOW_PLUGINS": "good, acme-twin-b"}, {"good", "twin"}),
        (("--allow", "good", "--allow", "lossy"), {"SPECPLUG_ALLOW_PLUGINS": "lossy,object"}, {"lossy"}),
        (("--allow", "twin"), {"SPECPLUG_DENY_PLUGINS": "acme-twin-a"}, {"twin"}),
    ],
)
def test_selection_by_option_and_environment(
    installed: Environment, arguments: tuple[str, ...], variables: dict[str, str], methods: set[str]
) -> None:
    assert installed.methods(*arguments, **variables) == methods


def test_selection_by_configuration(installed: Environment) -> None:
    script = installed.root / "selection.py"
    script.write_text(
        "import sys\n"
        "from specplug import LLM, SpecplugError\n"
        "config = {'method': 'good', 'num_speculative_tokens': 3}\n"
        "with LLM('tiny', speculative_config=config, allowed_plugins=['acme-good']) as llm:\n"
        "    print(llm.generate('x = [0, 0,')[0].outputs[0].metrics.by_method)\n"
        "for options in ({'denied_plugins': ['good']}, {'allowed_plugins': ['lossy']}):\n"
        "    try:\n"
        "        LLM('tiny', speculative_config=config, **options)\n"
        "    except SpecplugError as error:\n"
        "        print(error)\n"
        "print(sorted(name for name in sys.modules if name.startswith('acme')))\n",
        encoding="utf-8",
    )
    done = installed.run("python", str(script))
    assert done.returncode == 0, done.stderr
    used, denied, not_allowed, imported = (line for line in done.stdout.splitlines() if line != "leaving")
    assert "'good': DraftCounts" in used
    assert "is blocked: on the deny-list" in denied
    assert "is blocked: not on the allow-list" in not_allowed
    # An engine imports the methods it is configured with, and observers that it may.
    assert imported == "['acme_good', 'acme_liar', 'acme_observer']"


def test_what_is_blocked_is_not_imported(installed: Environment) -> None:
    done = installed.specplug("list", "--check", "--deny", "acme-exits")
    assert "leaving" not in done.stderr
    assert "leaving" in installed.specplug("list", "--check").stderr


SAMPLED = ("generate", "tiny", "--prompt", PROMPT, "--max-tokens", "16", "--temperature", "0.8", "--seed", "1")


@pytest.mark.parametrize("arguments", [GENERATE, SAMPLED])
def test_nothing_stops_or_alters_plain_decoding(installed: Environment, arguments: tuple[str, ...]) -> None:
    alone = installed.specplug(*arguments, SPECPLUG_ALLOW_PLUGINS="none")
    done = installed.specplug(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout
    assert done.stderr.count("it is switched off") == 2, "the observer that raises and the one that lies, each once"
    assert (
        "observer 'acme-observer' raised RuntimeError: verify is not observed in its wrapper of verify" in done.stderr
    )
    assert "observer 'acme-liar' returned a different object (Verdict) than `yield` gave" in done.stderr


def test_nothing_stops_or_alters_another_plugin(installed: Environment, plain: str) -> None:
    done = installed.specplug(*speculative("good"))
    assert done.returncode == 0, done.stderr
    assert plain.strip() in done.stdout
    assert "accepted of" in done.stdout + done.stderr
    assert "speculator 'good' failed" not in done.stderr


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("missing", "cannot be loaded: ModuleNotFoundError: No module named 'a_module_that_is_missing'"),
        ("panics", "cannot be loaded: Panic: from a native extension"),
        ("old", "is incompatible: needs specplug<0.1"),
        ("future", "is incompatible: needs specplug>=99"),
        ("twin", "is ambiguous: 2 packages provide 'twin'"),
        ("damaged", "'damaged' of package acme-damaged is unusable: its metadata cannot be read: METADATA is missing"),
        ("goood", "did you mean 'good'?"),
    ],
)
def test_those_who_ask_for_it_are_told_in_one_line(installed: Environment, method: str, text: str) -> None:
    done = installed.specplug(*speculative(method), "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    assert text in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("specplug: error:")]) == 1
    assert "Traceback" not in done.stderr


def test_results_of_a_rule_of_its_own_are_marked_everywhere(installed: Environment) -> None:
    deny = {"SPECPLUG_DENY_PLUGINS": "observer,liar"}
    shown = installed.specplug(*speculative("lossy"), **deny)
    assert "verified by its own rule, which specplug does not check" in shown.stdout + shown.stderr
    as_json = json.loads(installed.specplug(*speculative("lossy"), "--json", **deny).stdout)
    assert as_json["unverified_methods"] == ["lossy"]
    assert json.loads(installed.specplug(*speculative("good"), "--json", **deny).stdout)["unverified_methods"] == []
    checked = installed.specplug("check", "lossy", "--quick", "--only", "budgets", **deny)
    assert "it verifies by a rule of its own, which specplug does not check" in checked.stdout.splitlines()[-1]
