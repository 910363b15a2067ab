"""What users do wrong: each is one line on standard error, and an exit status."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fake_plugins import install

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONFIG = "--speculative-config"

FAILURES = [
    # speculative configuration
    ((CONFIG, '{"method": lookup}'), "not valid JSON at line 1, column 12"),
    ((CONFIG, "{folder}/bad.json"), "bad.json: not valid JSON at line 2, column 13"),
    ((CONFIG, "{folder}/latin.json"), "not UTF-8"),
    ((CONFIG, "{folder}"), "cannot be read: Is a directory"),
    ((CONFIG, "nowhere.json"), "'nowhere.json' is neither a JSON object nor a file"),
    ((CONFIG, '["lookup"]'), "expected a JSON object"),
    ((CONFIG, ""), "not valid JSON"),
    ((CONFIG, '{"method": "lookup", "method": "lookup"}'), "the key 'method' is given twice"),
    ((CONFIG, '{"num_speculative_tokens": 3}'), "needs 'method'"),
    ((CONFIG, '{"method": 5}'), "needs 'method'"),
    ((CONFIG, '{"method": "lookup", "num_speculative_tokens": 0}'), "num_speculative_tokens=0"),
    ((CONFIG, '{"method": "lookup", "num_speculative_tokens": "3"}'), "num_speculative_tokens='3'"),
    ((CONFIG, '{"method": "lookup", "fallback": 5}'), "expected a mapping, got 5"),
    ((CONFIG, '{"method": "lookup", "windw": 3}'), "unknown key 'windw' for method 'lookup'; did you mean 'window'?"),
    ((CONFIG, '{"method": "lokup"}'), "no speculator named 'lokup'; did you mean 'lookup'?"),
    ((CONFIG, '{"method": "lookup", "fallback": {"method": "nothing-like-it"}}'), "named 'nothing-like-it'"),
    ((CONFIG, '{"method": "future"}'), "is incompatible: needs specplug>=9"),
    ((CONFIG, '{"method": "lookup"}', "--deny-plugin", "acme-lookup"), "is blocked: on the deny-list"),
    ((CONFIG, '{"method": "lookup"}', "--allow-plugin", "other"), "is blocked: not on the allow-list"),
    # sampling
    (("--temperature", "-1"), "temperature=-1.0"),
    (("--temperature", "nan"), "temperature=nan"),
    (("--top-p", "0"), "top_p=0.0"),
    (("--top-k", "-5"), "top_k=-5"),
    (("--max-tokens", "0"), "max_tokens=0"),
    (("--seed", "99999999999999999999"), "seed=99999999999999999999"),
    # engine
    (("--memory", "lots"), "memory='lots'"),
    (("--memory", "1MiB"), "the budget is 1.0 MiB"),
    (("--max-model-len", "0"), "max_model_len=0"),
    (("--max-model-len", "9999999"), "max_model_len=9,999,999 is more than"),
    (("--dtype", "int3"), "dtype 'int3' is not one of"),
    (("--device", "quantum"), "device='quantum' is not a device's name"),
    (("--device", "meta"), "device='meta' is not supported"),
    (("--prompt", ""), "the prompt is empty"),
    (("--max-model-len", "4", "--prompt", "one two three four five six"), "the longest sequence is 4 tokens"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with plugins and unusable files."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SPECPLUG_ALLOW_PLUGINS", "lookup,future")
    install(tmp_path, "acme-lookup", methods={"lookup": ""})
    install(tmp_path, "acme-future", methods={"future": ""}, requires="specplug>=9")
    (tmp_path / "bad.json").write_text('{\n  "method": lookup\n}')
    (tmp_path / "latin.json").write_bytes('{"method": "café"}'.encode("latin-1"))
    return tmp_path


def fails(result: Any, message: str) -> None:
    """One line says it, after no more than the startup steps."""
    lines = result.stderr.splitlines()
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert lines[-1].startswith("specplug: error: ")
    assert message in lines[-1]
    assert all(re.match(r"  [1-6]/6 ", line) for line in lines[:-1])
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("arguments", "message"), FAILURES, ids=[" ".join(case[0]) for case in FAILURES])
def test_failures_of_generate(arguments: tuple[str, ...], message: str, run: Callable[..., Any], folder: Path) -> None:
    given = [argument.replace("{folder}", str(folder)) for argument in arguments]
    fails(run("generate", "tiny", "--prompt", "import os", "--dtype", "float32", *given), message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(run: Callable[..., Any]) -> None:
    fails(run("generate", "tiny", "--prompt", "import os", "--device", "cuda"), "has no CUDA device")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("./nowhere", "'./nowhere' is not a folder with a checkpoint"),
        ("{folder}", "has no config.json"),
        ("nobody/nothing", "'nobody/nothing' is no local folder"),
        ("not a name", "'not a name' is no local folder"),
    ],
)
def test_failures_of_targets(target: str, message: str, run: Callable[..., Any], tmp_path: Path) -> None:
    fails(run("generate", target.replace("{folder}", str(tmp_path)), "--prompt", "x"), message)


def test_failures_of_demo(run: Callable[..., Any], folder: Path) -> None:
    fails(run("demo", "--method", "lokup"), "no speculator named 'lokup'; did you mean 'lookup'?")
    fails(run("demo", "--method", "future"), "is incompatible: needs specplug>=9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nosuch",), "No such command 'nosuch'"),
        (("list", "--nosuch"), "No such option"),
        (("generate",), "Missing argument 'TARGET'"),
        (("generate", "tiny"), "Missing option '--prompt'"),
        (("generate", "tiny", "--prompt", "x", "--max-tokens", "many"), "'many' is not a valid integer"),
        (("generate", "tiny", "--prompt", "x", "--temperature", "hot"), "'hot' is not a valid float"),
        (("demo", "--max-tokens", "1"), "not in the range"),
        (("demo", "--num-speculative-tokens", "0"), "not in the range"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], message: str, run: Callable[..., Any]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_step_that_fails_is_named(run: Callable[..., Any]) -> None:
    result = run("generate", "tiny", "--prompt", "x", "--memory", "1MiB")
    assert result.stderr.splitlines()[-1].endswith("(startup step 1 of 6: plan from configuration and headers)")
