"""How PyTorch's threads wait for each other, and how many there are.

Both are PyTorch's own business where the user has decided, or has imported PyTorch first. Where specplug is what imports it,
its threads spin for a short time only, and there are no more of them than this process may use cores.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("specplug")
SPIN_COUNT = 1_000
"""Turns of libgomp's waiting loop before a thread sleeps, 20 to 50 microseconds on x86; its own default is 300,000.

About what lies between two parallel regions of a step, so that on a quiet machine threads seldom sleep within one. On a busy
machine every turn is taken from the time slice of a thread that could have computed: 10,000 cost nearly as much as the default.
"""
_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def waiting_variables() -> dict[str, str]:
    """The environment with which libgomp is to be loaded; empty where the user has chosen how threads wait."""
    return {} if any(map(os.environ.get, _POLICIES)) else {"GOMP_SPINCOUNT": str(SPIN_COUNT)}


@contextmanager
def importing() -> Iterator[None]:
    """Within the block PyTorch may be imported for the first time: its threads are then set up as this process needs them.

    The environment is as before afterwards: libgomp has read it, and the caller's children do not inherit it.
    """
    if "torch" in sys.modules:
        yield
        return
    added = waiting_variables()
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        if "torch" in sys.modules:
            _limit()


def _limit() -> None:
    import torch

    if not any(map(os.environ.get, _COUNTS)) and usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())


def warn_of_too_many() -> None:
    """One line of warning where PyTorch was imported before specplug, and has more threads than there are cores for them."""
    import torch

    cores, threads = usable_cores(), torch.get_num_threads()
    if threads > cores and not any(map(os.environ.get, _COUNTS)):
        logger.warning(
            "PyTorch runs %d threads, but this process may use %d of the machine's cores: call torch.set_num_threads(%d), or "
            "set OMP_NUM_THREADS=%d",
            threads,
            cores,
            cores,
            cores,
        )


def usable_cores(process: Path = Path("/proc/self")) -> int:
    """Cores that this process may use: by its affinity, and by the quota of its control group; at least 1.

    Args:
        process: the folder of /proc that describes it.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(process)
    # A part of a core is left to others: threads that use up a quota are all stopped until the next period begins.
    return max(1, allowed if quota is None else min(allowed, int(quota)))


def cpu_quota(process: Path = Path("/proc/self")) -> float | None:
    """Cores' worth of time that the process's control groups grant it, the least of all that contain it; None: no limit.

    Args:
        process: the folder of /proc that describes it.
    """
    quotas = [quota for folder in control_groups(process) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def control_groups(process: Path) -> Iterator[Path]:
    """The process's control groups with a say on processors, from its own to those that contain it, as far as they are seen.

    Args:
        process: the folder of /proc that describes it.
    """
    paths: dict[str, str] = {}
    for line in _lines(process / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            paths["cgroup"] = path
    for line in _lines(process / "mountinfo"):
        mount, _, system = line.partition(" - ")
        _, _, _, root, point, *_ = mount.split()
        kind, _, options = [*system.split(), "", "", ""][:3]
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        # A container may see the path of its group on the host, but has only the group itself mounted, as its root.
        path, base = paths[kind], root.rstrip("/")
        inner = path[len(base) :] if path == base or path.startswith(f"{base}/") else ""
        if ".." in inner.split("/"):  # it is not below what is mounted
            inner = ""
        top = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), point))
        folder = top / inner.strip("/")
        yield folder
        yield from (parent for parent in folder.parents if parent == top or top in parent.parents)


def _quota_of(folder: Path) -> float | None:
    """Of one control group, of either version."""
    try:
        if words := _lines(folder / "cpu.max"):
            limit, period = words[0].split()
        else:
            (limit,), (period,) = _lines(folder / "cpu.cfs_quota_us"), _lines(folder / "cpu.cfs_period_us")
        return int(limit) / int(period) if int(limit) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max", or no such files
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
