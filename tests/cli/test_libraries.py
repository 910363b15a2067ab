"""Importing the libraries costs no collections, and leaves a collector that works and does not go through them again."""

from __future__ import annotations

import subprocess
import sys

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
