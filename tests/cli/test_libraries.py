"""Starts: importing the libraries costs no collections, and the first words wait for no compiler."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest

from specplug import SpecplugError, native
from specplug.cli.run import chat, generate
from specplug.cli.terminal import Terminal

SCRIPT = """
import gc
from specplug.cli import process
from specplug.cli.process import import_libraries

collections = []
gc.callbacks.append(lambda phase, info: collections.append(info["generation"]))
import_libraries()
assert not collections, collections
assert gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > 100_000, frozen
mine = [[]]
mine[0].append(mine)
import_libraries()
assert gc.get_freeze_count() == frozen, "what a program makes itself is frozen too"
del mine
assert gc.collect() >= 2
gc.disable()
with process._importing():
    assert not gc.isenabled()
assert not gc.isenabled(), "what a program switched off is switched on"
"""


def test_nothing_is_collected_meanwhile_and_all_of_it_is_frozen() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


JOBS: dict[str, Any] = {
    "generate": lambda engine: generate.run_job(
        generate.GenerateJob("tiny", engine, [], {}, is_file=False, as_json=False, stats=False, quiet=False),
        *[Terminal(io.StringIO())] * 2,
    ),
    "chat": lambda engine: chat.run_job(
        chat.ChatJob("tiny", engine, {}, {}, system=None, template=None, has_template=True, quiet=False),
        *[Terminal(io.StringIO())] * 2,
    ),
}


@pytest.mark.parametrize("command", JOBS)
@pytest.mark.parametrize("compiles", [False, True])
def test_first_words_do_not_wait_until_kernels_are_compiled(
    command: str, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(native, "go_without", lambda: not asked.append(True))
    engine = {"max_num_seqs": 0, "device": "cpu", **({"compile": True} if compiles else {})}
    with pytest.raises(SpecplugError, match="max_num_seqs=0"):  # right after the decision
        JOBS[command](engine)
    assert asked == ([] if compiles else [True])
