"""The process group of the ranks, and the sum over it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

_LOOPBACK = "lo"
_TIMEOUT = timedelta(minutes=30)  # of one collective: reading a large checkpoint takes ranks different times


@contextmanager
def process_group(rank: int, size: int, meeting: Path, device: torch.device) -> Iterator[None]:
    """Joins the group of an engine's ranks, and leaves it at the end.

    Args:
        rank: of this process.
        size: how many there are.
        meeting: a file through which they find each other.
        device: of this rank's weights.

    Raises:
        RuntimeError: this process is in a process group already, or the ranks do not find each other.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "this process is in a torch.distributed process group already; start the engine in another one"
        )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)  # all ranks are on this machine
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(str(meeting), size)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks; the same bits on each."""
    dist.all_reduce(tensor)
    return tensor
