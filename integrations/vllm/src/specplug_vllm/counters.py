"""Counters of the speculators, from vLLM's worker to the process that publishes metrics.

vLLM carries its own statistics between these processes, and nothing of a plugin's. So the worker writes its counters to a
small file in the temporary folder, which both processes of a machine map. Its name comes from vLLM's `instance_id`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specplug.host import SpeculatorHost

logger = logging.getLogger("specplug")
COLUMNS = ("draft_tokens", "accepted_tokens", "propose_seconds", "faults", "enabled")
_HEADER_BYTES = 4096


def counter_path(vllm_config: Any, engine: int) -> Path:
    """Where an engine's counters are."""
    return Path(tempfile.gettempdir()) / f"specplug-vllm-{os.getuid()}-{vllm_config.instance_id}-{engine}"


class CounterFile:
    """The counters of one engine: a row of `COLUMNS` for each method.

    Args:
        path: of the file, which exists.
        mode: `r` reads, `r+` writes.
    """

    def __init__(self, path: Path, mode: str) -> None:
        if path.stat().st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user")
        with path.open("rb") as stream:
            self.methods: list[str] = json.loads(stream.read(_HEADER_BYTES).rstrip(b"\0"))
        shape = (len(self.methods), len(COLUMNS))
        self._values: Any = np.memmap(path, np.float64, mode, offset=_HEADER_BYTES, shape=shape)  # type: ignore[call-overload]

    @classmethod
    def create(cls, vllm_config: Any, methods: Sequence[str]) -> CounterFile | None:
        """The file of a worker, which removes it in the end; None on ranks that do not publish, or if it cannot be made."""
        parallel = vllm_config.parallel_config
        if parallel.rank % parallel.tensor_parallel_size:
            return None
        path = counter_path(vllm_config, parallel.data_parallel_index)
        unique = list(dict.fromkeys(methods))
        header = json.dumps(unique).encode().ljust(_HEADER_BYTES, b"\0")
        try:
            descriptor, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(header + bytes(8 * len(unique) * len(COLUMNS)))
            os.replace(name, path)
            made = cls(path, "r+")
        except OSError as error:
            logger.warning("counters of speculators are not published: %s", error)
            return None
        weakref.finalize(made, _remove, path)
        return made

    def write(self, host: SpeculatorHost) -> None:
        """Stores what a host has counted."""
        for row, method in enumerate(self.methods):
            counts = host.stats.by_method.get(method)
            self._values[row] = (
                0 if counts is None else counts.num_draft_tokens,
                0 if counts is None else counts.num_accepted_draft_tokens,
                host.seconds[method],
                host.faults[method],
                host.enabled[method],
            )

    def read(self) -> dict[str, dict[str, float]]:
        """The counters by method."""
        return {
            method: dict(zip(COLUMNS, self._values[row].tolist(), strict=True))
            for row, method in enumerate(self.methods)
        }


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
