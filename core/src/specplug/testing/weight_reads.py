"""Noticing that weights are read from a checkpoint."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

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
