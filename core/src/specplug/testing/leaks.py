"""What is alive: tensors, and host memory that plugins allocated; and reads of weights from a checkpoint."""

from __future__ import annotations

import contextlib
import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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
    """Leaves everything that exists now out of `live_tensors` and `live_bytes`, which are then quick.

    Where the process has frozen its imports, as `specplug` has, they stay frozen: collections would go through all of PyTorch.
    """
    has_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not has_frozen:
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


_OWN = ("specplug.model", "specplug.speculation")  # headers of pickles are read by torch, on the meta device


@contextlib.contextmanager
def watch_weight_reads() -> Iterator[list[str]]:
    """Collects the names of functions that read tensors from files, called by anyone but core, while it lasts."""
    import safetensors
    import safetensors.torch
    import torch
    import transformers

    reads: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if not _is_core(sys._getframe(1)):
                reads.append(name)
            return function(*args, **kwargs)

        return noted

    class NotingFile:
        """`safe_open`, whose headers may be read."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._own = _is_core(sys._getframe(1))
            self._file = opened(*args, **kwargs)

        def __enter__(self) -> Any:
            self._file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self._file.__exit__(*args)

        def __getattr__(self, name: str) -> Any:
            if name in ("get_tensor", "get_tensors") and not self._own:
                reads.append(f"safe_open(...).{name}")
            return getattr(self._file, name)

    opened = safetensors.safe_open
    replaced: dict[Any, Any] = {opened: NotingFile}
    for function, name in (
        (safetensors.torch.load_file, "safetensors.torch.load_file"),
        (safetensors.torch.load, "safetensors.torch.load"),
        (safetensors.torch.load_model, "safetensors.torch.load_model"),
        (torch.load, "torch.load"),
    ):
        replaced[function] = noting(name, function)
    places = list(_places(set(map(id, replaced))))
    pretrained = transformers.PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        reads.append(f"{cls.__name__}.from_pretrained")
        return pretrained.__func__(cls, *args, **kwargs)

    originals = [(module, name, vars(module)[name]) for module, name in places]
    try:
        for module, name, original in originals:
            setattr(module, name, replaced[original])
        transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        yield reads
    finally:
        transformers.PreTrainedModel.from_pretrained = pretrained
        for module, name, original in originals:
            setattr(module, name, original)


def _places(wanted: set[int]) -> Iterator[tuple[ModuleType, str]]:
    """Every module and name under which one of these objects is known."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                if id(value) in wanted:
                    yield module, name


def _is_core(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(_OWN)
