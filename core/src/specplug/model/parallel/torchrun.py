"""Ranks that torchrun started: they find each other through a socket in a private folder, and the first one leads as always."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from specplug.cache_folder import check_private
from specplug.errors import ConfigurationError, StartupError

_MEET_SECONDS = 300.0


def launched_rank(size: int, environment: Mapping[str, str] = os.environ) -> int | None:
    """This process's rank if torchrun started it as one of `size`; None if the engine starts the ranks itself.

    Raises:
        ConfigurationError: torchrun started another number of processes.
    """
    if size == 1 or "TORCHELASTIC_RUN_ID" not in environment:
        return None
    count = int(environment["WORLD_SIZE"])
    if count == 1:
        return None
    if count != size:
        raise ConfigurationError(
            f"tensor_parallel_size={size}, and torchrun started {count} processes: give --nproc-per-node {size}, or run "
            "without torchrun"
        )
    return int(environment["RANK"])


def meeting_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder in which the ranks of this run meet; only this user can write to it."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    key = hashlib.sha256("|".join(environment.get(name, "") for name in names).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"specplug-ranks-{os.getuid()}-{key}"
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)
    return folder


def accept_ranks(folder: Path, size: int) -> list[Connection]:
    """The pipes to the other ranks, in the order in which they come.

    Raises:
        StartupError: some did not come.
    """
    for name in ("socket", "meeting"):  # of a run that was killed
        (folder / name).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(size)
        listener.settimeout(_MEET_SECONDS)
        connections = []
        try:
            for _ in range(1, size):
                accepted, _ = listener.accept()
                accepted.setblocking(True)
                connections.append(Connection(accepted.detach()))
        except TimeoutError:
            raise StartupError(
                f"{size - 1 - len(connections)} of {size} ranks did not start an engine within {_MEET_SECONDS:.0f} seconds: "
                "run the same script on every rank"
            ) from None
        return connections


def join_first_rank(folder: Path) -> Connection:
    """The pipe to the first rank.

    Raises:
        StartupError: it does not start an engine.
    """
    deadline = time.monotonic() + _MEET_SECONDS
    while True:
        joined = socket.socket(socket.AF_UNIX)
        try:
            joined.connect(str(folder / "socket"))
            return Connection(joined.detach())
        except OSError:
            joined.close()
        if time.monotonic() > deadline:
            raise StartupError(f"the first rank did not start an engine within {_MEET_SECONDS:.0f} seconds")
        time.sleep(0.1)
