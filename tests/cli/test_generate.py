"""`specplug generate`."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from fake_plugins import install

from specplug import LLM, SamplingParams
from specplug.cli.options import engine_options, lora_options, option_names
from specplug.cli.run import generate as generate_run
from specplug.cli.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAULTY = """
from specplug import hookimpl

class Faulty:
    @hookimpl
    def propose(self, batch):
        raise RuntimeError("no idea")

@hookimpl
def load_speculator(config, target):
    print("noise from a plugin")
    return Faulty()
"""
LENIENT = """
from specplug import Verdict, hookimpl

class Lenient:
    @hookimpl
    def propose(self, batch):
        return None

    @hookimpl
    def verify(self, batch, proposal, target):
        return Verdict([[] for _ in batch.rows], target.argmax(range(target.offsets[-1])))

@hookimpl
def load_speculator(config, target):
    return Lenient()
"""
CONFIG_LENIENT = ("--speculative-config", '{"method": "lenient"}')
CRASHING = "from specplug import hookimpl\n@hookimpl\ndef load_speculator(config, target):\n    1 / 0\n"
PROMPT = "# Before:\ndef add(first, second):\n    return first + second\n\n# After renaming first to left:\n"
ARGUMENTS = ("generate", "tiny", "--prompt", PROMPT, "--max-tokens", "24", "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def expected() -> str:
    """What the model writes, as the Python API has it."""
    with LLM("tiny", dtype="float32", device="cpu", max_num_seqs=1, allowed_plugins=()) as llm:
        return llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=24))[0].outputs[0].text


def test_text_goes_to_standard_output_and_nothing_else(run: Callable[..., Any], expected: str) -> None:
    result = run(*ARGUMENTS, "--allow-plugin", "none")
    assert result.exit_code == 0
    assert result.stdout == expected.rstrip("\n") + "\n"
    steps = [line for line in result.stderr.splitlines() if re.match(r"  [1-6]/6 .*\d s$", line)]
    assert len(steps) == 6


def test_a_speculator_changes_nothing_but_the_stats(run: Callable[..., Any], expected: str, lookup: str) -> None:
    result = run(*ARGUMENTS, "--speculative-config", lookup, "--stats", "--quiet")
    assert result.stdout == expected.rstrip("\n") + "\n"
    stats = dict(re.split(r" {2,}", line, maxsplit=1) for line in result.stderr.splitlines())
    assert set(stats) == {"tokens", "speed", "target steps", "acceptance length", "lookup"}
    accepted, drafted = map(int, re.findall(r"\d+", stats["lookup"])[:2])
    num_tokens, steps = int(stats["tokens"].split()[0]), int(stats["target steps"])
    assert 0 < accepted <= drafted
    assert num_tokens == steps + accepted
    assert 1 < float(stats["acceptance length"].split()[0]) <= 6


def test_config_from_a_file_with_fallback(run: Callable[..., Any], lookup: str, tmp_path: Path) -> None:
    file = tmp_path / "speculation.json"
    file.write_text(json.dumps({"method": "lookup", "num_speculative_tokens": 2, "fallback": json.loads(lookup)}))
    result = run(*ARGUMENTS, "--speculative-config", str(file), "--stats")
    assert result.exit_code == 0
    assert "lookup" in result.stderr


def test_text_is_streamed(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, lookup: str) -> None:
    shown: list[str] = []
    original = Terminal.generated
    monkeypatch.setattr(Terminal, "generated", lambda self, *args: (shown.append(args[0]), original(self, *args))[1])
    result = run(*ARGUMENTS, "--speculative-config", lookup, "--quiet")
    assert len(shown) > 5
    assert "".join(shown).rstrip("\n") == result.stdout.rstrip("\n")


def test_sampling_options_reach_the_engine(run: Callable[..., Any], lookup: str) -> None:
    sampled = (*ARGUMENTS, "--quiet", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--seed")
    first, again, other = (run(*sampled, seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other
    assert run(*sampled, "1", "--speculative-config", lookup).stdout == first


def test_engine_options_reach_the_engine(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(generate_run, "run_job", lambda job, out, err: seen.update(job.engine))
    options = ("--memory", "64MiB", "--max-model-len", "256", "--revision", "main", "--trust-remote-code", "--strict")
    plugins = ("--allow-plugin", "a", "--allow-plugin", "b", "--deny-plugin", "c")
    assert run("generate", "tiny", "--prompt", "x", *options, *plugins).exit_code == 0
    assert seen["memory"] == "64MiB"
    assert seen["max_model_len"] == 256
    assert seen["revision"] == "main"
    assert seen["trust_remote_code"] is True
    assert seen["strict"] is True
    assert seen["allowed_plugins"] == ("a", "b")
    assert seen["denied_plugins"] == ("c",)
    assert run("generate", "tiny", "--prompt", "x", "--compile", "--max-num-draft-tokens", "8").exit_code == 0
    assert seen["compile"] is True
    assert seen["max_num_draft_tokens"] == 8


def test_every_engine_option_is_one(run: Callable[..., Any]) -> None:
    """None of them is taken for a sampling parameter, however new it is."""
    names = option_names(engine_options, lora_options)
    assert {"tensor_parallel_size", "scheduling_policy", "memory", "lora_modules"} <= set(names)
    unknown = run(*ARGUMENTS, "--tensor-parallel-size", "0", "--scheduling-policy", "priority")
    assert "tensor_parallel_size" in unknown.stderr
    assert "sampling parameter" not in unknown.stderr


def test_the_prompt_can_come_from_standard_input(run: Callable[..., Any], expected: str) -> None:
    arguments = [*ARGUMENTS[:3], "-", *ARGUMENTS[4:], "--quiet"]
    assert run(*arguments, stdin=PROMPT).stdout == expected.rstrip("\n") + "\n"


def test_a_method_with_a_rule_of_its_own_is_named(run: Callable[..., Any], installed: Callable[..., None]) -> None:
    installed("acme-lenient", methods={"lenient": ""}, source=LENIENT)
    notice = "lenient verifies by a rule of its own, which specplug does not check."
    assert notice in " ".join(run(*ARGUMENTS, "--quiet", *CONFIG_LENIENT).stderr.split())
    assert "rule of its own" not in run(*ARGUMENTS).stderr


def test_a_fault_costs_a_warning_and_no_output(
    run: Callable[..., Any], expected: str, installed: Callable[..., None]
) -> None:
    installed("acme-faulty", methods={"faulty": ""}, source=FAULTY)
    config = ("--speculative-config", '{"method": "faulty"}')
    result = run(*ARGUMENTS, *config, "--stats", "--quiet")
    assert result.exit_code == 0
    assert result.stdout == expected.rstrip("\n") + "\n"
    warnings = [line for line in result.stderr.splitlines() if line.startswith("specplug: warning: ")]
    assert len(warnings) == len(set(warnings)) > 0
    assert "RuntimeError: no idea" in warnings[0]
    assert "noise from a plugin" in result.stderr
    assert re.search(r"failed \d+ times", result.stderr)
    strict = run(*ARGUMENTS, *config, "--strict", "--quiet")
    assert strict.exit_code == 1
    message = "specplug: error: speculator 'faulty': RuntimeError: no idea (details: run again with --debug)"
    assert strict.stderr.splitlines()[-1] == message


def test_an_unexpected_error_is_one_line_and_a_traceback_with_debug(
    run: Callable[..., Any], installed: Callable[..., None]
) -> None:
    installed("acme-crashing", methods={"crashing": ""}, source=CRASHING)
    arguments = (*ARGUMENTS, "--quiet", "--speculative-config", '{"method": "crashing"}', "--allow-plugin", "crashing")
    result = run(*arguments)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert result.stderr.endswith(" (details: run again with --debug)\n")
    for again in (("--debug", *arguments), (*arguments, "--debug")):
        debugged = run(*again)
        assert debugged.exit_code == 1
        assert "Traceback (most recent call last)" in debugged.stderr
        assert debugged.stderr.splitlines()[-1].startswith("specplug: error: ")
        assert "run again" not in debugged.stderr


def test_on_a_terminal_accepted_drafts_are_coloured(tmp_path: Path) -> None:
    install(tmp_path, "acme-lookup", methods={"lookup": ""})
    arguments = [*ARGUMENTS, "--speculative-config", '{"method": "lookup"}']
    coloured = on_a_terminal(arguments, tmp_path)
    assert "\x1b[32m" in coloured
    assert "green: drafted by lookup" in coloured
    assert "def add(left, second):" in re.sub(r"\x1b\[[0-9;]*[mK]", "", coloured)


def on_a_terminal(arguments: list[str], path: Path) -> str:
    """What a terminal shows of standard output and standard error."""
    inside, outside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "specplug.cli.main", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=outside,
        stderr=outside,
        env=os.environ | {"PYTHONPATH": str(path), "TERM": "xterm-256color"},
    )
    os.close(outside)
    shown = b""
    with contextlib.suppress(OSError):  # a pty ends with an error
        while data := os.read(inside, 4096):
            shown += data
    os.close(inside)
    assert process.wait(60) == 0
    return shown.decode()
