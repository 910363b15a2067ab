"""The benchmarks are scripts beside the packages: their folder is not on the path of an installed specplug."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
