"""The process group of the ranks, and what they exchange: sums, ids, and what one must know of all."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

logger = logging.getLogger("specplug")
_LOOPBACK = "lo"
_LEAVE_SECONDS = 5.0
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
        _leave() if device.type == "cuda" else dist.destroy_process_group()


def abort() -> None:
    """Ends all sums of this process that still run: they fail, or give anything."""
    group = dist.group.WORLD
    if group is not None:
        group.abort()


def _leave() -> None:
    """Leaves the group; gives up after a while, since NCCL waits for ranks that are gone for ever."""
    leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
    leaving.start()
    leaving.join(_LEAVE_SECONDS)
    if leaving.is_alive():
        logger.warning("the ranks' process group did not end; start the next engine with ranks in another process")


@contextmanager
def local_rank(device: torch.device) -> Iterator[None]:
    """Transformers loads a part of a model to the GPU whose number is in LOCAL_RANK."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        if before is not None:
            os.environ["LOCAL_RANK"] = before


_library = torch.library.Library("specplug", "FRAGMENT")
_library.define("sum_over_ranks(Tensor part) -> Tensor")


@torch.library.impl(_library, "sum_over_ranks", "CompositeExplicitAutograd")
def _sum_over_ranks(part: torch.Tensor) -> torch.Tensor:
    total = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@torch.library.register_fake("specplug::sum_over_ranks", lib=_library)
def _empty_sum(part: torch.Tensor) -> torch.Tensor:
    return part.new_empty(part.shape)


def sum_over_ranks(part: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks; the same bits on each. An operator: compiled forwards and CUDA graphs hold it."""
    total: torch.Tensor = torch.ops.specplug.sum_over_ranks(part)
    return total


def share_ids(ids: torch.Tensor) -> None:
    """Replaces the ids of a forward by the first rank's, in place; a CUDA graph can hold it."""
    dist.broadcast(ids, src=0)


def worst_of_ranks(value: float) -> float:
    """The largest value that any rank gives; waits until all have given theirs."""
    worst = torch.tensor([value], dtype=torch.float64, device="cpu")
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)
