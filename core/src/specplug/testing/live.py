"""What is alive: tensors, and memory of the host that the code of plugins took."""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch
from torch._subclasses import FakeTensor

_CORE = str(Path(__file__).parents[1])
_CONTRACT = str(Path(_CORE, "contract"))
_LIBRARIES = ("/site-packages/torch/", "/site-packages/transformers/", "/site-packages/pluggy/")


@attrs.frozen
class LiveTensors:
    """The tensors that are alive and new.

    Attributes:
        count: how many tensor objects; several may share a storage.
        nbytes: of all their storages.
        borrowed_bytes: of those storages whose memory is not PyTorch's, as of tensors made from numpy arrays.
    """

    count: int
    nbytes: int
    borrowed_bytes: int


@contextlib.contextmanager
def only_what_is_new() -> Iterator[None]:
    """Leaves everything that exists now out of `live_tensors` and `live_bytes`, which are then quick."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Lets `host_bytes` see what is allocated from now on; all of Python is slower meanwhile."""
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    try:
        yield
    finally:
        if not was_tracing:
            tracemalloc.stop()


def host_bytes() -> int:
    """Bytes of Python objects and numpy arrays that are alive, and were allocated by plugins while `tracing`.

    It does not matter who holds them: the speculator, its class, a module.
    """
    gc.collect()
    statistics = tracemalloc.take_snapshot().statistics("filename")
    return sum(each.size for each in statistics if _is_a_plugins(each.traceback[0].filename))


def _is_a_plugins(file: str) -> bool:
    """Whether what a file's code allocates is a plugin's: what the contract's objects hand out is, since it kept them."""
    if file.startswith(_CORE):
        return file.startswith(_CONTRACT)
    return not file.startswith("<frozen") and not any(name in file for name in _LIBRARIES)


def live_bytes() -> int:
    """Bytes of all tensor storages that are alive and new."""
    return live_tensors().nbytes


def live_tensors() -> LiveTensors:
    """Looks at all tensors that are alive and new."""
    gc.collect()
    count = 0
    storages: dict[int, int] = {}
    borrowed: dict[int, int] = {}
    for thing in gc.get_objects():
        if (
            not issubclass(type(thing), torch.Tensor)
            or issubclass(type(thing), FakeTensor)
            or thing.device.type == "meta"
        ):
            continue
        count += 1
        if thing.is_mkldnn:  # a packed weight has no storage to show
            storages[id(thing)] = int(torch.ops.mkldnn._nbytes(thing))
            continue
        storage = thing.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if not storage.resizable():
            borrowed[storage.data_ptr()] = storage.nbytes()
    return LiveTensors(count, sum(storages.values()), sum(borrowed.values()))
