"""Ctrl-C in a real process."""

from __future__ import annotations

import _thread
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from specplug.cli.process import insistent_interrupts

if TYPE_CHECKING:
    from pathlib import Path

LONG = ("--max-tokens", "2000", "--ignore-eos")


def heed_interrupts() -> None:
    """What a terminal's shell does; one that runs in the background makes its children ignore interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(arguments: list[str], wait_for: str) -> tuple[int, str, str]:
    """Interrupts a command after it has written `wait_for`, and checks that it ends soon and whole.

    Returns its exit status, and what it wrote to standard output and standard error after that.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "specplug.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    seen = ""
    while wait_for not in seen:
        assert process.poll() is None, seen
        for stream in select.select([process.stdout, process.stderr], [], [])[0]:
            seen += os.read(stream.fileno(), 4096).decode()
    time.sleep(0.3)  # well inside the generation, which takes many seconds
    started = time.perf_counter()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everything that runs there
    output, errors = process.communicate(timeout=60)
    seconds = time.perf_counter() - started
    assert seconds < 2
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing of it is left
    return process.returncode, output.decode(), errors.decode()


def test_an_interrupt_ends_a_stream() -> None:
    """The text so far is kept and its line ended; libraries are silent."""
    status, output, errors = interrupted(["generate", "tiny", "--prompt", "import", *LONG], "6/6")
    assert status == 130
    assert output.endswith("\n")
    *steps, last = errors.splitlines()
    assert last == "specplug: interrupted"
    assert all(re.search(r"\d\.\d\d s$", line) for line in steps), errors


@pytest.mark.slow
def test_an_interrupt_ends_a_batch(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"import"\n' * 8)
    status, output, errors = interrupted(["generate", "tiny", "--prompts", str(file), *LONG], "  6/6 ")
    assert status == 130
    assert output == ""
    assert errors.splitlines()[-1] == "specplug: interrupted"
    assert "Traceback" not in errors


def test_an_interrupt_that_a_library_swallows_comes_again() -> None:
    heed_interrupts()
    before = signal.getsignal(signal.SIGINT)
    started = time.perf_counter()
    swallowed: list[BaseException] = []

    def run() -> None:
        with insistent_interrupts():
            try:
                while time.perf_counter() - started < 20:
                    time.sleep(0.01)
            except BaseException as error:  # as an import of something optional does
                swallowed.append(error)
            while time.perf_counter() - started < 20:
                time.sleep(0.01)

    threading.Timer(0.2, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(swallowed) == 1
    assert time.perf_counter() - started < 5
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_ends_the_start() -> None:
    status, output, errors = interrupted(["demo"], "Importing")
    assert status == 130
    assert errors.splitlines()[-1] == "specplug: interrupted"
    assert "Traceback" not in output + errors
