"""`specplug list`."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from fake_plugins import install, specplug

from specplug.cli import plugin_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from subprocess import CompletedProcess

BROKEN = 'print("noise")\nimport a_module_that_is_missing\n'
NO_HOOKS = "x = 1\n"
WRONG_SIGNATURE = "from specplug import hookimpl\n@hookimpl\ndef load_speculator(config, target=None): ...\n"
OBSERVER = "from specplug import hookimpl\n@hookimpl(wrapper=True)\ndef propose(batch):\n    return (yield)\n"
LONG_SUMMARY = "Drafts by guessing, and goes on to describe how it guesses at some length, in one line."


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plugin of every kind."""
    folder = tmp_path_factory.mktemp("site")
    install(folder, "acme-lookup", methods={"lookup": "", "lookup2": ""}, summary=LONG_SUMMARY)
    install(folder, "acme-broken", methods={"broken": ""}, source=BROKEN)
    install(folder, "acme-empty", methods={"empty": ""}, source=NO_HOOKS)
    install(folder, "acme-wrong", methods={"wrong": ""}, source=WRONG_SIGNATURE)
    install(folder, "acme-observer", methods={"observer": ""}, source=OBSERVER, requires="", group="specplug.observers")
    install(folder, "acme-future", methods={"future": ""}, requires="specplug>=9")
    install(folder, "twin-b", methods={"twin": ""})
    install(folder, "twin-a", methods={"twin": ""})
    return folder


def listed(*arguments: str, path: Path, **environment: str) -> dict[str, dict[str, Any]]:
    """`specplug list --json`, by package and method."""
    result = specplug("list", "--json", *arguments, path=path, **environment)
    return {f"{item['package']}/{item['method']}": item for item in json.loads(result.stdout)}


@pytest.fixture(scope="module")
def checked(site: Path) -> CompletedProcess[str]:
    """`list --json --check`: the plugins' imports take seconds."""
    return specplug("list", "--json", "--check", path=site)


def test_metadata_alone_tells_four_statuses(site: Path) -> None:
    found = listed("--deny", "lookup2", path=site)
    statuses = {name: item["status"] for name, item in found.items() if not name.startswith("specplug")}
    assert statuses == {
        "acme-broken/broken": "ok",
        "acme-empty/empty": "ok",
        "acme-future/future": "incompatible",
        "acme-lookup/lookup": "ok",
        "acme-lookup/lookup2": "blocked",
        "acme-observer/observer": "ok",
        "acme-wrong/wrong": "ok",
        "twin-a/twin": "ambiguous",
        "twin-b/twin": "ambiguous",
    }
    assert "needs specplug>=9" in found["acme-future/future"]["reason"]
    assert "twin-a, twin-b" in found["twin-a/twin"]["reason"]
    assert "deny-list" in found["acme-lookup/lookup2"]["reason"]
    assert all(item["hooks"] is None for item in found.values())


def test_check_finds_what_fails_and_shows_hooks(checked: CompletedProcess[str]) -> None:
    assert checked.returncode == 1
    found = {item["method"]: item for item in json.loads(checked.stdout)}
    assert found["lookup"]["status"] == "ok"
    assert found["lookup"]["hooks"] == ["load_speculator"]
    assert found["lookup2"]["hooks"] == ["load_speculator"]
    assert found["observer"]["hooks"] == []
    assert found["observer"]["wraps"] == ["propose"]
    assert found["broken"]["status"] == "failed"
    assert found["broken"]["reason"] == "ModuleNotFoundError: No module named 'a_module_that_is_missing'"
    assert "Traceback" in found["broken"]["traceback"]
    assert "'target' has a default" in found["wrong"]["reason"]
    assert found["wrong"]["reason"].startswith("plugin 'acme-wrong'")
    assert "no hook" in found["empty"]["reason"]
    assert found["future"]["hooks"] is None
    assert "noise" in checked.stderr


def test_json_keys_are_stable(site: Path, checked: CompletedProcess[str]) -> None:
    for items in (listed(path=site).values(), json.loads(checked.stdout)):
        for item in items:
            assert list(item) == [
                "method",
                "package",
                "version",
                "status",
                "summary",
                "reason",
                "entry_point",
                "location",
                "requires",
                "hooks",
                "wraps",
                "traceback",
                "overrides_verify",
                "kind",
            ]


def test_a_pipe_gets_plain_whole_lines(site: Path) -> None:
    result = specplug("list", path=site, COLUMNS="40")
    lines = result.stdout.splitlines()
    assert result.returncode == 0
    assert result.stderr == ""
    assert lines[0].split() == ["METHOD", "PACKAGE", "VERSION", "STATUS", "SUMMARY"]
    assert any(line.startswith("lookup ") and line.endswith(LONG_SUMMARY) for line in lines)
    assert "\x1b" not in result.stdout
    assert "…" not in result.stdout
    assert "3 of" in lines[-1]
    assert "specplug list -v" in lines[-1]


def test_verbose_adds_where_it_comes_from_and_why_not(site: Path) -> None:
    text = specplug("list", "-v", path=site).stdout
    assert "lookup = acme_lookup" in text
    assert f"location      {site}" in text
    assert "requires      specplug>=9" in text
    assert "requires      any specplug" in text
    assert "incompatible  needs specplug>=9" in text
    assert "ambiguous     2 packages provide 'twin'" in text


def test_verbose_check_shows_tracebacks(
    site: Path, checked: CompletedProcess[str], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imports take seconds, so what `checked` found is answered again."""
    monkeypatch.syspath_prepend(site)
    answers = {item["method"]: item | {"verifiers": []} for item in json.loads(checked.stdout)}
    for answer in answers.values():
        if answer["hooks"] is None:
            del answer["hooks"]
    monkeypatch.setattr(plugin_report, "_import", lambda asked: [answers[each.method] for each in asked])
    text = run("list", "--check").stdout
    assert "failed        ModuleNotFoundError" in text
    assert "Traceback" not in text
    assert "specplug list -v --check" in text
    verbose = run("list", "-v", "--check").stdout
    assert "Traceback" in verbose
    assert "hooks         propose (wrapper)" in verbose


def test_allow_and_deny_by_method_package_and_environment(site: Path) -> None:
    def ok(*arguments: str, **environment: str) -> set[str]:
        found = listed(*arguments, path=site, **environment)
        return {item["method"] for item in found.values() if item["status"] == "ok"}

    assert ok("--allow", "lookup") == {"lookup"}
    assert ok("--allow", "acme-lookup") == {"lookup", "lookup2"}
    assert ok("--allow", "acme-lookup", "--deny", "lookup") == {"lookup2"}
    assert ok(SPECPLUG_ALLOW_PLUGINS="lookup,broken") == {"lookup", "broken"}
    assert ok("--deny", "twin-b", "--allow", "twin") == {"twin"}


def test_damaged_entry_points_cost_only_their_own_package(tmp_path: Path) -> None:
    install(tmp_path, "acme-lookup", methods={"lookup": ""})
    for package, text in (
        ("acme-damaged", "[specplug]\nno value\n"),
        ("other-damaged", "[console_scripts]\nno value\n"),
    ):
        install(tmp_path, package, methods={"x": ""})
        info = tmp_path / f"{package.replace('-', '_')}-1.2.dist-info"
        (info / "entry_points.txt").write_text(text, encoding="utf-8")
    install(tmp_path, "acme-nameless", methods={"nameless": ""})
    (tmp_path / "acme_nameless-1.2.dist-info" / "METADATA").unlink()
    found = listed(path=tmp_path)
    assert found["acme-lookup/lookup"]["status"] == "ok"
    for name in ("acme-damaged/?", "acme-nameless/nameless"):
        assert found[name]["status"] == "failed"
        assert found[name]["reason"].startswith("its metadata cannot be read: ")
    assert not any(name.startswith("other-damaged") for name in found)
    assert specplug("list", path=tmp_path).returncode == 0


def test_a_requirement_of_an_extra_or_another_platform_does_not_count(tmp_path: Path) -> None:
    install(tmp_path, "acme-extra", methods={"extra": ""}, requires="specplug>=99; extra == 'next'")
    install(tmp_path, "acme-both", methods={"both": ""}, requires="specplug>=0.1\nRequires-Dist: specplug<99")
    found = listed(path=tmp_path)
    assert (found["acme-extra/extra"]["status"], found["acme-extra/extra"]["requires"]) == ("ok", "")
    assert (found["acme-both/both"]["status"], found["acme-both/both"]["requires"]) == ("ok", "<99,>=0.1")


def test_a_stale_copy_further_down_the_path_is_not_a_rival(tmp_path: Path) -> None:
    for folder, version in (("first", "2.0"), ("second", "1.0")):
        (tmp_path / folder).mkdir()
        install(tmp_path / folder, "acme-lookup", methods={"lookup": ""}, version=version)
    result = specplug("list", "--json", PYTHONPATH=f"{tmp_path / 'first'}{os.pathsep}{tmp_path / 'second'}")
    found = [item for item in json.loads(result.stdout) if item["method"] == "lookup"]
    assert [(item["version"], item["status"]) for item in found] == [("2.0", "ok")]


def test_neither_torch_nor_any_plugin_is_imported() -> None:
    """Also with `--check`, unless a plugin does it."""
    script = (
        "import sys; from specplug.cli.main import cli\n"
        "cli(sys.argv[1:], standalone_mode=False)\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(names & {'torch', 'transformers', 'numpy', 'rich', 'specplug_ngram'}), file=sys.stderr)"
    )
    import subprocess

    result = subprocess.run([sys.executable, "-c", script, "list", "-v"], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"


def test_it_is_fast() -> None:
    """It takes 0.13 s on two idle cores; importing torch alone would take seconds."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        specplug("list")
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0


def test_nothing_installed(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_report, "find_plugins", lambda *_: [])
    result = run("list")
    assert result.exit_code == 0
    assert "pip install specplug-ngram" in result.stdout
    assert json.loads(run("list", "--json").stdout) == []


def test_the_real_command_is_installed(run: Callable[..., Any]) -> None:
    version = run("--version")
    assert version.stdout.startswith("specplug 0.")
    for command in ([], ["list"], ["generate"], ["demo"]):
        shown = run(*command, "--help")
        assert shown.exit_code == 0
        assert re.search(r"^  Examples?:\n    specplug ", shown.stdout, re.MULTILINE)
