"""What is alive: bytes of tensors, and how much an object holds on to."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch._subclasses import FakeTensor


@contextlib.contextmanager
def only_what_is_new() -> Iterator[None]:
    """Leaves everything that exists now out of `live_bytes`, which is then quick."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_bytes() -> int:
    """Bytes of all tensor storages that are alive and new."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if (
            not issubclass(type(thing), torch.Tensor)
            or issubclass(type(thing), FakeTensor)
            or thing.device.type == "meta"
        ):
            continue
        if thing.is_mkldnn:  # a packed weight has no storage to show
            storages[id(thing)] = int(torch.ops.mkldnn._nbytes(thing))
        else:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


_LEAVES = (
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    str,
    bytes,
    int,
    float,
    complex,
    torch.dtype,
)


def held_items(thing: Any, outside: tuple[Any, ...] = ()) -> int:
    """How many items an object holds on to in containers and attributes, directly and indirectly.

    A tensor counts as its elements. `outside` and what only it leads to are left out.
    """
    seen = {id(each) for each in outside}
    pending, count = [thing], 0
    while pending:
        each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            count += each.numel()
            continue
        if isinstance(each, (list, tuple, dict, set, frozenset)):
            count += len(each)
        elif _is_lent(type(each).__module__):
            continue
        pending.extend(other for other in gc.get_referents(each) if not isinstance(other, _LEAVES))
    return count


def _is_lent(module: str) -> bool:
    """Whether objects of a module's classes belong to core or to libraries, and not to the speculator."""
    if module.startswith("specplug.contract"):
        return False
    return module.partition(".")[0] in ("transformers", "tokenizers", "logging", "specplug")
