"""The soak of benchmarks/soak.py, for two minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_two_minutes_at_full_load(tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    command = [
        sys.executable,
        str(SOAK),
        "--seconds",
        "120",
        "--json",
        str(report),
        "--plot",
        str(tmp_path / "soak.svg"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text())["counts"]["greedy"] > 20
    assert "<svg" in (tmp_path / "soak.svg").read_text()
