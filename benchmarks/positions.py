"""Checkpoints with more positions than they were trained for, where only costs matter."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path


def with_positions(folder: Path, positions: int) -> Path:
    """A copy of the checkpoint's folder, with links to its weights, whose configuration has more positions."""
    copy = Path(tempfile.mkdtemp(prefix="more-positions-"))
    for file in folder.iterdir():
        if file.name == "config.json":
            config = json.loads(file.read_text(encoding="utf-8"))
            config["max_position_embeddings"] = positions
            (copy / file.name).write_text(json.dumps(config), encoding="utf-8")
        else:
            (copy / file.name).symlink_to(file.resolve())
    return copy
