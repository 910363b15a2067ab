"""Every mistake is one line on standard error that says what is wrong, where, and how to mend it; and an exit status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from bad_files import make_files, make_targets
from error_cases import (
    CONFIG,
    GENERATE,
    OPTIONS,
    PLAN,
    PROMPT_FILES,
    REQUESTS,
    STARTS,
    TARGETS,
    USAGE,
)
from fake_plugins import install

from specplug import LLM
from specplug.errors import SpecplugError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plugins, files and checkpoints that cannot be used."""
    folder = tmp_path_factory.mktemp("errors")
    install(folder, "acme-lookup", methods={"lookup": ""})
    install(folder, "acme-future", methods={"future": ""}, requires="specplug>=9")
    install(folder, "acme-broken", methods={"broken": ""}, source="import missing_\n")
    make_files(folder)
    make_targets(folder)
    return folder


@pytest.fixture
def plugins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("SPECPLUG_ALLOW_PLUGINS", "lookup,future,broken")


@pytest.fixture(scope="session")
def llm(folder: Path) -> Iterator[LLM]:
    """A running engine without a tokenizer."""
    with LLM(folder / "mute", skip_tokenizer_init=True, max_model_len=32, memory="8MiB", allowed_plugins=()) as llm:
        yield llm


def fails(result: Any, message: str, status: int = 1) -> None:
    """One line says it, and nothing else is said."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("specplug: error: ")
    assert message in line


def said(error: SpecplugError, message: str) -> None:
    assert message in str(error)
    assert "\n" not in str(error)


def test_the_table_is_long() -> None:
    assert len(OPTIONS) + len(PROMPT_FILES) + len(TARGETS) + len(USAGE) + len(REQUESTS) + len(STARTS) > 120


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[" ".join(options) for options, _ in OPTIONS])
def test_options(options: tuple[str, ...], message: str, run: Callable[..., Any], folder: Path, plugins: None) -> None:
    given = [option.replace("{folder}", str(folder)) for option in options]
    fails(run(*GENERATE, "--quiet", *given), message)


@pytest.mark.parametrize(("data", "message"), PROMPT_FILES, ids=[message[:50] for _, message in PROMPT_FILES])
def test_prompt_files(data: bytes, message: str, run: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(data)
    fails(run("generate", "tiny", "--prompts", str(file), "--quiet", "--allow-plugin", "none"), f"{file.name}{message}")


@pytest.mark.parametrize(("target", "message"), TARGETS, ids=[target for target, _ in TARGETS])
def test_targets(target: str, message: str, run: Callable[..., Any], folder: Path) -> None:
    target = target.replace("{folder}", str(folder))
    fails(run("generate", target, "--prompt", "x", "--quiet", "--allow-plugin", "none"), message)


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(arguments) for arguments, _ in USAGE])
def test_usage(arguments: tuple[str, ...], message: str, run: Callable[..., Any]) -> None:
    fails(run(*arguments), message, status=2)


@pytest.mark.parametrize(("use", "message"), REQUESTS, ids=[message[:50] for _, message in REQUESTS])
def test_requests(use: Callable[[LLM], Any], message: str, llm: LLM) -> None:
    with pytest.raises(SpecplugError) as caught:
        use(llm)
    said(caught.value, message)
    assert not llm.engine.has_unfinished_requests


@pytest.mark.parametrize(("options", "message"), STARTS, ids=[message[:50] for _, message in STARTS])
def test_starts(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(SpecplugError) as caught:
        LLM(folder / "mute", skip_tokenizer_init=True, **options)
    said(caught.value, message)


def test_the_same_from_every_command(run: Callable[..., Any], folder: Path, plugins: None) -> None:
    fails(run(*PLAN, CONFIG, '{"method": "lokup"}'), "no speculator named 'lokup'; did you mean 'lookup'?")
    fails(run("plan", str(folder / "truncated")), "is truncated")
    fails(run("demo", "--method", "lokup"), "no speculator named 'lokup'; did you mean 'lookup'?")
    fails(run("demo", "--method", "future"), "is incompatible: needs specplug>=9")


def test_files_that_cannot_be_read(run: Callable[..., Any], tmp_path: Path) -> None:
    fails(run("generate", "tiny", "--prompts", "nowhere.jsonl"), "'nowhere.jsonl' cannot be read: No such file")
    fails(run("generate", "tiny", "--prompts", str(tmp_path)), "cannot be read: Is a directory")
    fails(
        run("generate", "tiny", "--prompts", "-", stdin='"a"\nb\n'),
        "standard input, line 2: not valid JSON at column 1",
    )
    fails(run("generate", "tiny", "--prompt", "-", stdin=""), "--prompt -: the prompt is empty")


@pytest.mark.parametrize("arguments", [("list",), ("list", "--json"), ("plan", "tiny"), (*GENERATE, "-q"), ("demo",)])
def test_output_that_cannot_be_written(
    arguments: tuple[str, ...], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out() -> Any:
        from specplug.cli.terminal import Terminal

        return Terminal(open("/dev/full", "w"))

    monkeypatch.setattr("specplug.cli.terminal.Terminal.out", out)
    fails(run(*arguments), "No space left on device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(run: Callable[..., Any]) -> None:
    fails(run("generate", "tiny", "--prompt", "x", "--device", "cuda", "-q"), "has no CUDA device; use cpu")


def test_a_closed_engine(folder: Path) -> None:
    llm = LLM(folder / "mute", skip_tokenizer_init=True, memory="8MiB", allowed_plugins=())
    llm.close()
    with pytest.raises(SpecplugError, match="the engine is closed"):
        llm.generate([[3]])


def test_a_step_that_fails_is_named(run: Callable[..., Any]) -> None:
    result = run("generate", "tiny", "--prompt", "x", "--memory", "1MiB")
    step, line = result.stderr.splitlines()
    assert step == f"  1/6 {'plan from configuration and headers':<36}failed"
    assert line.endswith("(startup step 1 of 6: plan from configuration and headers)")


def test_an_interrupt(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("specplug.cli.run.generate.run_job", interrupt)
    result = run("generate", "tiny", "--prompt", "x")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "specplug: interrupted\n")
