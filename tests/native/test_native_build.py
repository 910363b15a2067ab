"""Which compiler is called, and what is done when a library cannot be loaded."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from specplug.native import build, library
from specplug.native.build import BuildError, build_library, find_compiler

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECPLUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


def program(path: Path) -> Path:
    path.write_text('#!/bin/sh\necho "$@" > "$0.called"\nexit 1\n')
    path.chmod(0o755)
    return path


def test_all_words_of_cxx_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper, compiler = program(tmp_path / "my cache"), program(tmp_path / "g++")
    monkeypatch.setenv("CXX", f"'{wrapper}' {compiler} -pipe")
    assert find_compiler() == [str(wrapper), str(compiler), "-pipe"]
    key = build._key(find_compiler())
    with pytest.raises(BuildError, match=r"my cache' .* failed"):
        build_library()
    assert (tmp_path / "my cache.called").read_text().startswith(f"{compiler} -pipe -O3 ")
    compiler.write_text("another version")
    assert build._key(find_compiler()) != key


@pytest.mark.parametrize("named", ["", "  "])
def test_an_empty_cxx_names_nothing(named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", named)
    program(tmp_path / "g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() == ["g++"]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found"):
        find_compiler()


@pytest.mark.parametrize(
    ("named", "message"),
    [("no-such-compiler -O1", "CXX names 'no-such-compiler -O1', which was not found"), ("'", "CXX")],
)
def test_a_cxx_that_is_not_there_is_named(named: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    with pytest.raises(BuildError, match=message):
        build_library()


def test_a_library_that_cannot_be_loaded_is_built_twice_and_never_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As from a file system on which nothing may be executed."""
    built: list[Path] = []

    def compile_(compiler: list[str], output: Path, on_wait: object) -> None:
        built.append(output)
        output.write_text("a library")

    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment")

    monkeypatch.setattr(build, "_compile", compile_)
    monkeypatch.setattr(torch.ops, "load_library", refuse)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert not library._try_to_load()
        (record,) = caplog.records
        assert "failed to map segment" in record.getMessage()
    assert len(built) == 2
    (marker,) = folder.iterdir()
    assert f"delete {marker} to try again" in record.getMessage()
    marker.unlink()
    library._try_to_load()
    assert len(built) == 4


def test_a_library_that_others_may_write_to_is_not_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(build, "_compile", lambda compiler, output, on_wait: output.write_text("a library"))
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    path = build_library()
    path.chmod(0o722)
    with caplog.at_level(logging.WARNING):
        assert not library._try_to_load()
    path.chmod(0o700)
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert not library._try_to_load()
    assert [f"others may write to {part}" in caplog.text for part in (path, folder)] == [True, True]
    assert not loaded


def test_two_processes_that_start_together_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As threads here, each of which opens the lock for itself."""
    built: list[Path] = []

    def compile_(compiler: list[str], output: Path, on_wait: object) -> None:
        built.append(output)
        time.sleep(0.3)
        output.write_text("a library")

    monkeypatch.setattr(build, "_compile", compile_)
    with ThreadPoolExecutor(3) as pool:
        (path,) = set(pool.map(lambda _: build_library(), range(3)))
    assert len(built) == 1
    assert path.read_text() == "a library"
    assert [part.name for part in path.parent.iterdir()] == [path.name]


def test_a_slow_compiler_tells_how_long_it_has_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = program(tmp_path / "g++")
    slow.write_text("#!/bin/sh\nsleep 2.5\necho error: no >&2\nexit 1\n")
    monkeypatch.setenv("CXX", str(slow))
    told: list[float] = []
    with pytest.raises(BuildError, match="failed: error: no"):
        build_library(told.append)
    assert [round(seconds) for seconds in told] == [1, 2]


def test_what_must_be_compiled_is_known_before(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library._State, "loaded", None)
    assert library.must_be_compiled()
    monkeypatch.setenv("SPECPLUG_NATIVE", "0")
    assert not library.must_be_compiled()
    monkeypatch.delenv("SPECPLUG_NATIVE")
    monkeypatch.setattr(build, "_compile", lambda compiler, output, on_wait: output.write_text("a library"))
    build_library()
    assert not library.must_be_compiled()
    assert not library.go_without()
    assert library._State.loaded is None


def test_a_process_that_goes_without_leaves_compiling_to_another_and_its_failure_is_told_later(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library._State, "loaded", None)
    monkeypatch.setenv("CXX", str(program(tmp_path / "g++")))
    assert library.go_without()
    assert not library.load()
    assert not library.go_without()
    deadline = time.monotonic() + 120
    while not list(folder.glob("*.unloadable")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    monkeypatch.setattr(library._State, "loaded", None)
    assert not library.must_be_compiled()
    with caplog.at_level(logging.WARNING):
        assert not library.load()
    assert "g++ failed" in caplog.text
    assert "to try again" in caplog.text


def run_python(tmp_path: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "SPECPLUG_CACHE": str(tmp_path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)


REFUSAL = """
import torch
from specplug import native
assert native.load()
short = [torch.zeros(1, 2, 3, 4)] * 3 + [torch.zeros(2, 8, 4)] * 2 + [torch.zeros(3), torch.zeros(3).long()]
try:
    torch.ops.specplug.attend(*short, 1.0, 0, 0.0, None)
except RuntimeError as error:
    print("refused:", error)
"""


@pytest.mark.slow
def test_a_compiler_with_a_runtime_of_its_own_makes_kernels_whose_errors_arrive(tmp_path: Path) -> None:
    done = run_python(tmp_path, REFUSAL, CXX=shlex.join([*find_compiler(), "-static-libstdc++"]))
    assert done.returncode == 0, done.stderr
    assert "refused: attend: expected a dense int32 plan" in done.stdout
    (library,) = (tmp_path / "native").glob("*.so")
    assert b"libstdc++.so.6" in library.read_bytes()  # PyTorch's, not the compiler's own


PROGRAM = """
import logging; logging.basicConfig()
from specplug import LLM, SamplingParams, native
llm = LLM("tiny", dtype="bfloat16", device="cpu", memory="64MiB")
print(llm.generate("def add(a, b):", SamplingParams(max_tokens=4, temperature=0))[0].outputs[0].token_ids, native.available())
"""


@pytest.mark.slow
def test_without_a_compiler_pytorch_serves(tmp_path: Path) -> None:
    """One line of warning, and the same output up to rounding."""
    done = run_python(tmp_path, PROGRAM, PATH="", CXX="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("False")
    warnings = [line for line in done.stderr.splitlines() if "native kernels are not used" in line]
    assert len(warnings) == 1
    assert "no C++ compiler was found" in warnings[0]


@pytest.mark.slow
def test_a_broken_compiler_and_a_damaged_library_are_survived(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = run_python(tmp_path, PROGRAM, CXX=str(broken))
    assert done.returncode == 0, done.stderr
    assert "no such thing" in done.stderr
    assert not list((tmp_path / "native").iterdir())
    wrapper = tmp_path / "wrapper"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    compiler = shlex.join([str(wrapper), *find_compiler()])
    done = run_python(tmp_path, PROGRAM, CXX=compiler)
    assert done.stdout.rstrip().endswith("True"), done.stderr
    (library,) = (tmp_path / "native").iterdir()
    library.write_bytes(b"cut off")
    done = run_python(tmp_path, PROGRAM, CXX=compiler)
    assert done.stdout.rstrip().endswith("True"), done.stderr


@pytest.mark.slow
def test_they_can_be_switched_off(tmp_path: Path) -> None:
    done = run_python(tmp_path, PROGRAM, SPECPLUG_NATIVE="0")
    assert done.stdout.rstrip().endswith("False")
    assert "native kernels" not in done.stderr
