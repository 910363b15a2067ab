"""How PyTorch's threads wait for each other while other processes compete for the cores."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path

import torch

CONTENDED = 0.1
"""Share of the time for which the stepping thread waits for a core; above it, the cores are contended.

Measured on two cores with the embedded model in bfloat16: 0.00 to 0.04 on a quiet machine, 0.27 to 0.54 with one or two
competing busy loops, and 0.12 to 0.48 once threads sleep early.
"""
QUIET = 0.06
"""Share below which the cores are free again."""
PERIOD = 0.05
"""Seconds of one measurement; reading the clock of the scheduler takes 15 microseconds."""
QUIET_PERIODS = 20
"""Periods in a row below `QUIET` before threads spin again."""
_USERS_CHOICE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_ELEMENTS_PER_THREAD = 1 << 16  # twice the elements that PyTorch gives to a thread at least


class CoreContention:
    """Lets PyTorch's threads sleep early while other processes compete for the cores.

    A thread that is done with its share of a layer waits for the others in a loop, for several milliseconds by default. If a
    competing process has the core of one of those others, the loop uses up the time slice that the thread itself needs.
    libgomp waits for a few microseconds only if it manages more threads than there are cores (`GOMP_SPINCOUNT` in its manual).
    So this class keeps idle teams of threads while the cores are contended. They take no time, and the default wait comes
    back without them. On two cores with two busy loops the embedded model decodes 3 to 5 times as many tokens per second.

    Does nothing with one thread, if the user has chosen how threads wait, or without Linux's scheduler statistics.

    Args:
        clock: the file of the stepping thread's scheduler statistics: nanoseconds of running and of waiting for a core.
    """

    def __init__(self, clock: Path = Path("/proc/thread-self/schedstat")) -> None:
        self._clock = clock
        self._works = not any(map(os.environ.get, _USERS_CHOICE)) and clock.exists()
        self._thread = -1
        self._since = 0.0
        self._delay = 0.0
        self._quiet_periods = 0
        self._release: threading.Event | None = None
        self._teams: list[threading.Thread] = []

    @property
    def is_contended(self) -> bool:
        """Whether threads sleep early."""
        return self._release is not None

    def observe(self) -> None:
        """Measures, if a period has passed; called by the stepping thread after every step."""
        now = time.perf_counter()
        if now - self._since < PERIOD or not self._works or torch.get_num_threads() == 1:
            return
        delay, thread = self._read_delay(), threading.get_ident()
        if thread == self._thread:
            self._decide((delay - self._delay) / (now - self._since))
        self._thread, self._since, self._delay = thread, now, delay

    def close(self) -> None:
        """Ends the idle teams."""
        if self._release is not None:
            self._release.set()
            for team in self._teams:
                team.join()
            self._release, self._teams = None, []

    def _decide(self, share: float) -> None:
        self._quiet_periods = self._quiet_periods + 1 if share < QUIET else 0
        if self._release is None and share > CONTENDED:
            self._start_teams()
        elif self._quiet_periods >= QUIET_PERIODS:
            self.close()

    def _start_teams(self) -> None:
        threads = torch.get_num_threads()
        self._release = release = threading.Event()
        # libgomp counts the engine's `threads` and, of every other team, all but the thread that started it.
        for _ in range(max(1, math.ceil((len(os.sched_getaffinity(0)) + 1 - threads) / (threads - 1)))):
            team = threading.Thread(target=_keep_team, args=(threads, release), name="specplug-idle-team", daemon=True)
            team.start()
            self._teams.append(team)

    def _read_delay(self) -> float:
        return int(self._clock.read_text(encoding="ascii").split()[1]) * 1e-9


def _keep_team(threads: int, release: threading.Event) -> None:
    """Starts a team of threads with a parallel operation; libgomp ends them with the thread that started them."""
    torch.zeros(threads * _ELEMENTS_PER_THREAD, dtype=torch.float32, device="cpu").neg_()
    release.wait()
