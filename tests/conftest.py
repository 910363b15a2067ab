"""Markers by folder, settings for all tests, and the limit for tests without a marker."""

from __future__ import annotations

import os
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
FOLDERS = {"unit": "unit", "engine": "engine", "native": "native", "gpu": "gpu", "packaging": "packaging"}
LONGEST_SECONDS = 2.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test by the folder that it is in; `unit` where nothing says otherwise."""
    for item in items:
        folders = item.path.relative_to(TESTS).parts[:-1] if item.path.is_relative_to(TESTS) else ()
        marks = {FOLDERS[folder] for folder in folders if folder in FOLDERS} or {"engine"}
        for mark in marks:
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def _short_unless_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test of `make check` must be short. Processor time: other load on the machine does not count."""
    started = time.process_time()
    yield
    seconds = time.process_time() - started
    if seconds > LONGEST_SECONDS and not MARKED & {mark.name for mark in request.node.iter_markers()}:
        pytest.fail(f"took {seconds:.1f} s of processor time: mark it `slow`, or move it to tests/engine")
