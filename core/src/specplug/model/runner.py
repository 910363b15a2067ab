"""Runs one causal LM over packed, ragged batches. The target and the models of speculators use the same runner."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplug.contract.types import Boundary
from specplug.model import attention
from specplug.model.architecture import Architecture
from specplug.model.attention import AttentionSite
from specplug.model.compiled import CompiledForward
from specplug.model.cuda_graphs import CudaGraphs
from specplug.model.forward import ForwardBatch, ForwardRow, can_attend_natively
from specplug.model.kv_cache import KVCache
from specplug.model.taps import Taps
from specplug.model.trace import TracedBatch


class ModelRunner:
    """A loaded model bound to its KV cache."""

    def __init__(
        self,
        model: torch.nn.Module,
        architecture: Architecture,
        cache: KVCache,
        device: torch.device,
        boundaries: Sequence[Boundary] = (),
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.cache = cache
        self.device = device
        self.taps = Taps(model, architecture.layers, boundaries)
        self.sites: list[AttentionSite] = []
        self.compiled: CompiledForward | None = None
        self.graphs: CudaGraphs | None = None
        for call, keys, values in zip(architecture.calls, cache.keys, cache.values, strict=True):
            site = AttentionSite(keys, values, call.mask.window)
            model.get_submodule(call.module).__dict__[attention.SITE] = site
            self.sites.append(site)

    @torch.inference_mode()
    def forward(
        self, rows: Sequence[ForwardRow], logits_index: Sequence[int] | None = None, *, lasting: bool = True
    ) -> torch.Tensor:
        """Runs the rows' new tokens and stores their KV.

        Args:
            rows: the rows; each one's table must hold its new tokens.
            logits_index: the packed positions to compute logits for; None for all.
            lasting: whether anybody keeps logits or captured states beyond the next forward. On a CPU they last anyway.

        Returns:
            Logits [len(logits_index), vocabulary]. Captured states are in `taps.captured` until the next forward.
        """
        batch = ForwardBatch(rows, self.cache, logits_index)
        replayed = None if self.graphs is None else self.graphs.replay(batch, lasting=lasting)
        if replayed is not None:
            logits, self.taps.captured = replayed
        elif self.compiled is not None:
            logits, self.taps.captured = self.compiled(
                batch.input_ids, batch.position_ids, batch.plan, batch.write_slots, batch.logits_index
            )
        else:
            keep: int | torch.Tensor = 0 if batch.wants_all else batch.logits_index
            logits = self._run_model(batch, batch.input_ids, batch.position_ids, keep)
        return logits if logits_index is None else logits[: len(logits_index)]

    def run_tensors(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        plan: torch.Tensor,
        write_slots: torch.Tensor,
        logits_index: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[int | str, torch.Tensor]]:
        """A forward with native attention over tensors alone, as a CUDA graph can hold it: logits and captured states."""
        if self.compiled is not None:
            return self.compiled(input_ids, position_ids, plan, write_slots, logits_index)
        logits = self._run_model(TracedBatch(plan, write_slots), input_ids, position_ids, logits_index)
        return logits, dict(self.taps.captured)

    def _run_model(
        self,
        batch: ForwardBatch | TracedBatch,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        keep: int | torch.Tensor,
    ) -> torch.Tensor:
        """The model's own code."""
        self.taps.captured.clear()
        for site in self.sites:
            site.batch = batch
        try:
            output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=keep)
        finally:
            for site in self.sites:
                site.batch = None
        return output.logits[0]

    @property
    def attends_natively(self) -> bool:
        """Whether attention is native, as a compiled forward needs it."""
        return can_attend_natively(self.cache)

    @property
    def cache_tensors(self) -> list[torch.Tensor]:
        """Keys and values, layer by layer."""
        return [tensor for site in self.sites for tensor in (site.keys, site.values)]

    def close(self) -> None:
        """Takes hooks and cache references off the model."""
        self.compiled = None
        self.graphs = None
        self.taps.remove()
        for call in self.architecture.calls:
            self.model.get_submodule(call.module).__dict__.pop(attention.SITE, None)
        self.sites.clear()
