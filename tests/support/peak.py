"""How much memory tensors take: now, and at the peak of some operations."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def tensor_bytes() -> int:
    """Bytes of all storages that are alive."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if not isinstance(thing, torch.Tensor) or isinstance(thing, FakeTensor) or thing.device.type == "meta":
            continue
        if thing.is_mkldnn:  # a packed weight, which has no storage to show
            storages[id(thing)] = int(torch.ops.mkldnn._nbytes(thing))
        else:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are alive at once.

    Args:
        known: tensors that do not count.

    Attributes:
        peak: the most bytes so far.
    """

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._ignored = {storage._cdata for storage in self._known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._ignored:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out
