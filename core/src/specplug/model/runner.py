"""Runs one causal LM over packed, ragged batches. The target and the models of speculators use the same runner."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplug.contract.traits import Boundary
from specplug.model import attention
from specplug.model.architecture import Architecture
from specplug.model.attention import AttentionSite
from specplug.model.forward import ForwardBatch, ForwardRow
from specplug.model.kv_cache import KVCache
from specplug.model.taps import Taps


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
        self.gather_rows = device.type != "cpu"
        self.taps = Taps(model, architecture.layers, boundaries)
        self._sites: list[AttentionSite] = []
        for call, keys, values in zip(architecture.calls, cache.keys, cache.values, strict=True):
            site = AttentionSite(keys, values)
            model.get_submodule(call.module).__dict__[attention.SITE] = site
            self._sites.append(site)

    @torch.inference_mode()
    def forward(self, rows: Sequence[ForwardRow], logits_index: Sequence[int] | None = None) -> torch.Tensor:
        """Runs the rows' new tokens and stores their KV.

        Args:
            rows: the rows; each one's table must hold its new tokens.
            logits_index: the packed positions to compute logits for; None for all.

        Returns:
            Logits [len(logits_index), vocabulary]. Captured states are in `taps.captured` until the next forward.
        """
        batch = ForwardBatch(rows, self.device, self.cache.num_slots, gather_rows=self.gather_rows)
        if logits_index is None or list(logits_index) == list(range(batch.num_tokens)):
            keep: int | torch.Tensor = 0
        else:
            keep = torch.tensor(list(logits_index) or [0], device=self.device)
        self.taps.captured.clear()
        for site in self._sites:
            site.batch = batch
        try:
            output = self.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, logits_to_keep=keep
            )
        finally:
            for site in self._sites:
                site.batch = None
        logits = output.logits[0]
        return logits if logits_index is None else logits[: len(logits_index)]

    def close(self) -> None:
        """Takes hooks and cache references off the model."""
        self.taps.remove()
        for call in self.architecture.calls:
            self.model.get_submodule(call.module).__dict__.pop(attention.SITE, None)
        self._sites.clear()
