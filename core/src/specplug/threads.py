"""The number of PyTorch's threads: if specplug imports PyTorch, no more than cores that this process may use.

The number stays unchanged if the user has chosen it, or has imported PyTorch first. How threads wait for each other is decided
at run time, see `specplug.engine.contention`.
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
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def importing() -> Iterator[None]:
    """Limits PyTorch's threads if PyTorch is first imported inside the block."""
    is_first = "torch" not in sys.modules
    try:
        yield
    finally:
        if is_first and "torch" in sys.modules:
            _limit()


def _limit() -> None:
    import torch

    if not any(map(os.environ.get, _COUNTS)) and usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())


def warn_of_too_many() -> None:
    """Warns if PyTorch was imported before specplug and has more threads than cores that this process may use."""
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
    """Returns the number of cores that this process may use, from its affinity and control group quota; at least 1.

    Args:
        process: its folder in /proc.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(process)
    # Rounded down: threads that exhaust the quota are all stopped until the next period begins.
    return max(1, allowed if quota is None else min(allowed, int(quota)))


def cpu_quota(process: Path = Path("/proc/self")) -> float | None:
    """Returns the CPU quota of the process in cores, the lowest of all its control groups; None without a limit.

    Args:
        process: its folder in /proc.
    """
    quotas = [quota for folder in control_groups(process) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def control_groups(process: Path) -> Iterator[Path]:
    """Yields the control groups of the process with a CPU controller, from its own to its ancestors, as far as visible.

    Args:
        process: its folder in /proc.
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
        # A container may see the host path of its group, but only the group itself is mounted, as the root.
        path, base = paths[kind], root.rstrip("/")
        inner = path[len(base) :] if path == base or path.startswith(f"{base}/") else ""
        if ".." in inner.split("/"):  # outside the mounted group
            inner = ""
        top = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), point))
        folder = top / inner.strip("/")
        yield folder
        yield from (parent for parent in folder.parents if parent == top or top in parent.parents)


def _quota_of(folder: Path) -> float | None:
    """Returns the quota of one control group, version 1 or 2; None without a limit."""
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
