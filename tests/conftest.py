"""Markers by folder, settings for all tests, and the limit for tests without a marker."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Every worker is one process per core; PyTorch's own threads would compete with the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TESTS = Path(__file__).parent
MARKED = {"engine", "slow", "packaging", "gpu"}
FOLDERS = ("unit", "engine", "native", "gpu", "packaging")
LONGEST_SECONDS = float(os.environ.get("LONGEST_TEST_SECONDS", "inf"))  # `make check` sets 2
FEW_MODULES = 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test by the folder that it is in; other folders are `engine` unless a file or test says `unit`."""
    for item in items:
        if item.path.is_relative_to(TESTS):
            folder = next((part for part in item.path.relative_to(TESTS).parts[:-1] if part in FOLDERS), None)
            if folder is not None:
                item.add_marker(folder)
            elif item.get_closest_marker("unit") is None:
                item.add_marker("engine")
        else:  # an example's tests are written without this repository's markers
            item.add_marker("slow" if "conformance" in item.path.name else "engine")


@pytest.fixture(autouse=True, scope="module")
def _imports_are_frozen() -> None:
    """Collections of garbage, which many tests ask for, do not go through all of PyTorch: that was a fifth of all time."""
    if gc.get_freeze_count() == 0:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _short_unless_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test of `make check` must be short. Processor time: other load on the machine does not count."""
    modules, started = len(sys.modules), time.process_time()
    yield
    seconds = time.process_time() - started
    if seconds <= LONGEST_SECONDS or MARKED & {mark.name for mark in request.node.iter_markers()}:
        return
    if len(sys.modules) <= modules + FEW_MODULES:  # else it paid for imports that serve all tests after it
        pytest.fail(f"took {seconds:.1f} s of processor time: mark it `slow`, or move it to tests/engine")
