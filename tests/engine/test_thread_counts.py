"""PyTorch has as many threads as there are cores for them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specplug import threads
from specplug.threads import cpu_quota, usable_cores

LIBRARY = "import os; before = dict(os.environ); from specplug import pack_linears; assert before == dict(os.environ)"
SHOW = "import torch; print(torch.get_num_threads())"
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
V1 = "30 20 0:27 {root} {point} rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V2 = "30 20 0:27 {root} {point} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"


def run(script: str, *, cores: set[int] | None = None, **variables: str) -> str:
    """What a process of its own prints."""
    kept = {name: value for name, value in os.environ.items() if name not in CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=kept | variables,
        preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def machine(folder: Path, cgroup: str, mounts: str) -> Path:
    """A folder like /proc/self."""
    process = folder / "proc"
    write(process, {"cgroup": cgroup, "mountinfo": mounts})
    return process


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("group", "root", "files", "quota"),
    [
        ("/", "/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("/", "/", {"cpu.max": "max 100000\n"}, None),
        ("/", "/", {}, None),
        ("/a/b", "/", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("/a/b", "/", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("/a/b", "/a", {"cpu.max": "300000 100000\n", "b/cpu.max": "max 100000\n"}, 3.0),
        ("/docker/1f", "/docker/1f", {"cpu.max": "250000 100000\n"}, 2.5),
        ("/seen/by/the/host", "/", {"cpu.max": "250000 100000\n"}, 2.5),
        ("/../other", "/", {"cpu.max": "250000 100000\n", "../other/cpu.max": "1000 100000\n"}, 2.5),
        ("/", "/", {"cpu.max": "damaged\n"}, None),
    ],
)
def test_a_quota_of_version_2_is_the_least_of_all_groups_around_the_process(
    group: str, root: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    point = tmp_path / "mounted here"
    write(point, files)
    process = machine(tmp_path, f"0::{group}\n", V2.format(root=root, point=str(point).replace(" ", r"\040")) + "\n")
    assert cpu_quota(process) == quota


@pytest.mark.parametrize(
    ("root", "files", "quota"),
    [
        ("/", {"pod/cpu.cfs_quota_us": "150000\n", "pod/cpu.cfs_period_us": "100000\n"}, 1.5),
        ("/", {"pod/cpu.cfs_quota_us": "-1\n", "pod/cpu.cfs_period_us": "100000\n"}, None),
        ("/pod", {"cpu.cfs_quota_us": "25000\n", "cpu.cfs_period_us": "50000\n"}, 0.5),
    ],
)
def test_so_is_one_of_version_1(root: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    other, point = tmp_path / "memory", tmp_path / "cpu,cpuacct"
    write(point, files)
    mounts = V1.format(root=root, point=point)
    mounts += f"\n31 20 0:28 / {other} rw - cgroup cgroup rw,memory\n32 20 0:29 / {other} rw - cgroup2 cgroup2 rw\n"
    assert cpu_quota(machine(tmp_path, "5:memory:/pod\n4:cpu,cpuacct:/pod\n0::/\n", mounts)) == quota


@pytest.mark.parametrize(("quota", "cores"), [("150000", 1), ("50000", 1), ("max", None), ("99900000", None)])
def test_cores_are_what_affinity_and_quota_allow_together(quota: str, cores: int | None, tmp_path: Path) -> None:
    write(tmp_path / "groups", {"cpu.max": f"{quota} 100000\n"})
    process = machine(tmp_path, "0::/\n", V2.format(root="/", point=tmp_path / "groups"))
    assert usable_cores(process) == (cores or len(os.sched_getaffinity(0)))


def test_a_process_without_such_files_may_use_what_its_affinity_allows(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


LIMITED = f"""
from specplug import threads
threads.cpu_quota = lambda process=None: 1.5
{LIBRARY}
{SHOW}
"""


@pytest.mark.slow
def test_a_quota_limits_the_threads_unless_the_user_has_said_how_many() -> None:
    assert run(LIMITED) == "1\n"
    assert run(LIMITED, OMP_NUM_THREADS="2") == "2\n"
    assert run(f"import torch; torch.set_num_threads(3); {LIBRARY}; {SHOW}") == "3\n"


def test_one_core_of_the_affinity_has_one_thread() -> None:
    assert run(f"{LIBRARY}; {SHOW}", cores={min(os.sched_getaffinity(0))}) == "1\n"


def test_more_threads_than_cores_that_somebody_else_has_started_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in CHOICES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda process: 1.5)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with caplog.at_level(logging.WARNING):
            threads.warn_of_too_many()
        (record,) = caplog.records
        assert "PyTorch runs 3 threads, but this process may use 1 of" in record.getMessage()
        caplog.clear()
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        threads.warn_of_too_many()
        assert not caplog.records
    finally:
        torch.set_num_threads(before)
