"""Where specplug keeps what it works out once: parity verdicts, compiled kernels, compiled forwards."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_folder() -> Path:
    """`$SPECPLUG_CACHE`, else `specplug` below the user's cache folder."""
    if named := os.environ.get("SPECPLUG_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specplug"
