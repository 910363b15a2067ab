"""Standard streams that are closed, or that nobody reads any more: no traceback, and the command goes on where it can."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from support.marks import slow_except

QUICK = {  # commands that import no PyTorch
    "list": ("list",),
    "help": ("--help",),
    "a wrong option": ("plan", "tiny", "--max-num-seq", "3"),
    "an unknown method": ("generate", "tiny", "--prompt", "x", "--speculative-config", '{"method": "lokup"}'),
}
GENERATE = ("generate", "tiny", "--prompt", "import os", "--max-tokens", "12", "--dtype", "float32", "--ignore-eos")


def shell(words: tuple[str, ...], redirection: str) -> subprocess.CompletedProcess[str]:
    """Runs the command under a shell, which closes streams or reads them in part."""
    script = f'"$@" {redirection}'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}", "bash", sys.executable, "-m", "specplug", *words],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    "redirection",
    slow_except(["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "| head -0", "2>&1 >/dev/null | head -0"], ">&-", "| head -0"),
)
@pytest.mark.parametrize("words", QUICK.values(), ids=QUICK)
def test_no_traceback(words: tuple[str, ...], redirection: str) -> None:
    done = shell(words, redirection)
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr
    if redirection == "2>&-":
        assert done.stderr == ""
    if redirection == ">&-" and words == ("list",):
        assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_standard_error_does_not_stop_generation(run: Callable[..., Any]) -> None:
    expected = run(*GENERATE)
    assert expected.exit_code == 0, expected.stderr
    assert "6/6" in expected.stderr
    closed = shell(GENERATE, "2>&- <&-")
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, expected.stdout, "")


@pytest.mark.slow
def test_a_standard_error_that_nobody_reads_does_not_stop_it(run: Callable[..., Any]) -> None:
    expected = run(*GENERATE)
    unread = shell((*GENERATE, "--stats"), "2> >(head -c 1 >/dev/null)")
    assert (unread.returncode, unread.stdout) == (0, expected.stdout)


def test_nothing_else_is_opened_in_the_place_of_a_closed_stream() -> None:
    script = """
import os, sys
from specplug.cli.process import open_streams
open_streams()
assert open(os.devnull).fileno() > 2
for stream in (sys.stdin, sys.stdout, sys.stderr):
    assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == os.devnull
print("lost"), print("lost", file=sys.stderr, flush=True)
assert sys.stdin.read() == ""
"""
    done = subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", script], check=False)
    assert done.returncode == 0
