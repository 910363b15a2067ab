"""The weights of a checkpoint that a speculator reads: headers at once, tensors when core loads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch

from specplug.errors import PluginError
from specplug.model.load.checkpoint import load_tensors, read_headers, read_json_config, resolve_checkpoint

Progress = Callable[[float], None]


class LazyWeights:
    """See `specplug.WeightsHandle`."""

    def __init__(self, source: str, revision: str | None, dtype: torch.dtype, device: torch.device) -> None:
        self.folder = resolve_checkpoint(source, revision, pickles=True)
        self._headers = read_headers(self.folder, pickles=True)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: header.shape for name, header in self._headers.items()}
        self.dtypes: Mapping[str, torch.dtype] = {name: header.dtype for name, header in self._headers.items()}
        self._dtype = dtype
        self._device = device
        self._tensors: dict[str, torch.Tensor] | None = None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """See `WeightsHandle.config`."""
        return read_json_config(self.folder)

    def keep(self, names: Iterable[str]) -> None:
        """See `WeightsHandle.keep`."""
        wanted = set(names)
        if unknown := sorted(wanted - self.shapes.keys()):
            raise PluginError(f"{self.folder} has no tensor '{unknown[0]}' to keep")
        if self._tensors is not None:
            raise PluginError("keep() was called after the weights were loaded; call it before plan_memory")
        self._headers = {name: header for name, header in self._headers.items() if name in wanted}

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """See `WeightsHandle.num_bytes`."""
        floating = dtype or self._dtype
        total = 0
        for header in self._headers.values():
            stored = floating if header.dtype.is_floating_point else header.dtype
            total += torch.Size(header.shape).numel() * stored.itemsize
        return total

    def materialize(self, progress: Progress) -> None:
        """Reads the tensors."""
        self._tensors = load_tensors(
            self._headers, self._device, self._dtype, lambda done, total: progress(done / max(total, 1))
        )

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """See `WeightsHandle.tensors`."""
        if self._tensors is None:
            raise PluginError("the tensors can be read from warmup on, until release() is called")
        return self._tensors

    def release(self) -> None:
        """See `WeightsHandle.release`."""
        self._tensors = None

    def close(self) -> None:
        """Drops the tensors."""
        self.release()
