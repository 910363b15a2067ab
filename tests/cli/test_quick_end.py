"""A command's process ends right after its exit handlers, and loses nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What stands for PyTorch takes the place of its teardown too: a module whose end is seen when Python takes it apart.
SCRIPT = """
import atexit, sys, threading, time, types
from specplug.cli.process import quick_end

class Teardown:
    def __del__(self):
        sys.__stdout__.write("torn down\\n")

if {heavy}:
    sys.modules["torch"] = types.ModuleType("torch")
teardown = Teardown()
with quick_end():
    atexit.register(print, "exit handler", end="")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("output")
    {ending}
"""


def run(ending: str, heavy: bool = True) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(heavy=heavy, ending=ending)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("ending", "status"),
    [("pass", 0), ("sys.exit(3)", 3), ("sys.exit()", 0), ("sys.exit('words')", 1), ("raise ValueError('why')", 1)],
)
def test_everything_but_the_teardown_happens(ending: str, status: int) -> None:
    result = run(ending)
    assert result.returncode == status
    assert result.stdout == "output\nthread\nexit handler"
    assert ("ValueError: why" in result.stderr) == ("ValueError" in ending)
    assert ("words" in result.stderr) == ("words" in ending)


def test_a_light_process_ends_as_python_ends_it() -> None:
    assert run("pass", heavy=False).stdout.endswith("exit handlertorn down\n")


def test_output_that_cannot_be_written_is_reported() -> None:
    result = run("sys.stdout.write('more'); sys.stdout.flush(); sys.stdout = open('/dev/full', 'w'); print('lost')")
    assert result.returncode != 0
    assert "No space left on device" in result.stderr
