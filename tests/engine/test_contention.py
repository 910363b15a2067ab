"""PyTorch's threads sleep early while other processes compete for the cores, and spin again afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specplug.engine import contention
from specplug.engine.contention import PERIOD, QUIET_PERIODS, CoreContention

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
STATISTICS = Path("/proc/thread-self/schedstat")


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Clock:
    """The scheduler's statistics of a thread that waits for a core for a given share of the time."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.now, self.delay = folder / "schedstat", 100.0, 0.0
        monkeypatch.setattr(contention.time, "perf_counter", lambda: self.now)
        self.advance(0.0, 0.0)

    def advance(self, seconds: float, share: float) -> None:
        self.now += seconds * 1.001  # rounding must not end before the period does
        self.delay += seconds * share
        self.file.write_text(f"0 {int(self.delay * 1e9)} 1\n", encoding="ascii")


def idle_teams() -> int:
    return sum(thread.name == "specplug-idle-team" for thread in threading.enumerate())


def test_idle_teams_are_kept_while_cores_are_contended(
    two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(tmp_path, monkeypatch)
    monitor = CoreContention(clock.file)
    observed: list[bool] = []
    for share in (0.03, 0.03, 0.3, *[0.08] * 30, *[0.01] * (QUIET_PERIODS - 1), 0.07, *[0.01] * QUIET_PERIODS):
        monitor.observe()
        clock.advance(PERIOD, share)
        monitor.observe()
        observed.append(monitor.is_contended)
    before_the_end = len(observed) - 1
    assert observed == [False, False, *[True] * (before_the_end - 2), False]
    assert idle_teams() == 0


def test_closing_ends_the_teams(two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(tmp_path, monkeypatch)
    monitor = CoreContention(clock.file)
    monitor.observe()
    clock.advance(PERIOD, 0.5)
    monitor.observe()
    assert idle_teams() >= 1
    monitor.close()
    assert idle_teams() == 0
    monitor.close()


@pytest.mark.parametrize("reason", ["one thread", "the user's choice", "no statistics"])
def test_nothing_happens_where_it_cannot_help(
    two_threads: None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(tmp_path, monkeypatch)
    if reason == "one thread":
        torch.set_num_threads(1)
    elif reason == "the user's choice":
        monkeypatch.setenv("GOMP_SPINCOUNT", "300000")
    monitor = CoreContention(tmp_path / "missing" if reason == "no statistics" else clock.file)
    for _ in range(3):
        monitor.observe()
        clock.advance(PERIOD, 0.9)
    assert not monitor.is_contended


CONTENDED = """
import os, threading, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import torch
from specplug.engine.contention import CoreContention

torch.set_num_threads(2)
values = torch.zeros(1 << 20, dtype=torch.float32)

def regions(seconds):
    end, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        values.neg_()
        count += 1
        if monitor is not None:
            monitor.observe()
    return count / seconds

monitor = None
input()
default = regions(2.0)
monitor = CoreContention()
regions(0.5)
print(monitor.is_contended, regions(2.0) / default, flush=True)
monitor.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATISTICS.exists(), reason="no scheduler statistics")
@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="needs two cores")
def test_competitors_are_noticed_and_cost_less() -> None:
    gains = []
    while (
        len(gains) < 3 and max(gains, default=0.0) <= 1.3
    ):  # what else the machine does changes between the two halves
        contended, gain = beside_two_busy_loops()
        assert contended
        gains.append(gain)
    assert max(gains) > 1.3


def beside_two_busy_loops() -> tuple[bool, float]:
    """Whether contention is noticed, and by how much that speeds up parallel regions."""
    environment = {name: value for name, value in os.environ.items() if name not in (*CHOICES, "OMP_NUM_THREADS")}
    cores = sorted(os.sched_getaffinity(0))[:2]
    busy = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {cores})\nwhile True: pass"]
    process = subprocess.Popen(
        [sys.executable, "-c", CONTENDED], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    competitors = [subprocess.Popen(busy) for _ in range(2)]
    try:
        time.sleep(0.2)
        answer, _ = process.communicate("\n", timeout=120)
    finally:
        for each in (*competitors, process):
            each.kill()
            each.wait()
    contended, gain = answer.split()
    return contended == "True", float(gain)
