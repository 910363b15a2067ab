"""Runs one causal LM over packed, ragged batches. The target and the models of speculators use the same runner."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from specplug.contract.types import Boundary
from specplug.model.architecture.architecture import Architecture
from specplug.model.attention.interface import SITE, AttendedBatch, AttentionSite
from specplug.model.batch import ForwardBatch, can_attend_natively
from specplug.model.compile.compiled import CompiledStep
from specplug.model.compile.cuda_graphs import CudaGraphs
from specplug.model.compile.trace import TensorBatch, tensors_of
from specplug.model.kv_cache import KVCache
from specplug.model.pending import PendingTokens
from specplug.model.recurrent.batch import StateBatch
from specplug.model.recurrent.memory import TracedRows
from specplug.model.recurrent.store import StateStore
from specplug.model.rows import ForwardRow
from specplug.model.taps import Taps

if TYPE_CHECKING:
    from specplug.lora.layers import AdapterLayers


class ModelRunner:
    """A loaded model bound to its KV cache, and to the recurrent states of its rows if its layers have any.

    Args:
        model: the model.
        architecture: of the model.
        cache: its KV cache.
        device: where both are.
        boundaries: of the residual stream, to be captured.
        states: slots and entries per slot (see `StateStore`) of recurrent states; None for a model that has none.

    Attributes:
        compiled: its forward as machine code, for batches without adapters.
        graphs: the same in CUDA graphs.
        adapters: the LoRA adapters that its rows may have; None without any.
        compiled_adapted: its forward as machine code, for batches with adapters.
        pending: ids that its rows may name before the host knows them; None if they may not.
        accepted: what verification has left on the device for drafts; None if nothing ever is.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        architecture: Architecture,
        cache: KVCache,
        device: torch.device,
        boundaries: Sequence[Boundary] = (),
        states: tuple[int, int] | None = None,
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.cache = cache
        self.device = device
        self.taps = Taps(model, architecture.layers, boundaries)
        self.sites: list[AttentionSite] = []
        self.compiled: CompiledStep | None = None
        self.graphs: CudaGraphs | None = None
        self.adapters: AdapterLayers | None = None
        self.compiled_adapted: CompiledStep | None = None
        self.pending: PendingTokens | None = None
        self.accepted: PendingTokens | None = None
        for call, keys, values in zip(architecture.calls, cache.keys, cache.values, strict=True):
            site = AttentionSite(keys, values, call.mask.window)
            model.get_submodule(call.module).__dict__[SITE] = site
            self.sites.append(site)
        self.states: StateStore | None = None
        if architecture.state_calls:
            assert states is not None, "the model has recurrent states"
            self.states = StateStore(model, architecture.state_calls, *states, cache.dtype, device)

    def forward(
        self, rows: Sequence[ForwardRow], logits_index: Sequence[int] | None = None, *, lasting: bool = True
    ) -> torch.Tensor:
        """Runs the rows' new tokens and stores their KV.

        Args:
            rows: the rows; each one's table must hold its new tokens.
            logits_index: the packed positions to compute logits for; None for all.
            lasting: whether the caller keeps logits or captured states beyond the next forward. On a CPU they last anyway.

        Returns:
            Logits [len(logits_index), vocabulary]. Captured states are in `taps.captured` until the next forward.
        """
        return self.run(rows, logits_index, lasting=lasting)

    @torch.inference_mode()
    def run(
        self, rows: Sequence[ForwardRow], logits_index: Sequence[int] | None = None, *, lasting: bool = True
    ) -> torch.Tensor:
        """What this process does of a forward."""
        batch = ForwardBatch(rows, self.cache, logits_index)
        segments = None if self.adapters is None else self.adapters.segments(rows)
        with self._states_of(rows) as state_batch:
            outputs = self._run_captured(batch, segments, lasting=lasting)
            if outputs is None:
                if self.pending is not None and batch.has_placeholders:
                    self.pending.fill(batch.input_ids[0])
                outputs = self._run_compiled(batch, segments, state_batch)
            if outputs is None:
                keep: int | torch.Tensor = 0 if batch.wants_all else batch.logits_index
                with self._adapters_of(segments):
                    logits = self._run_model(batch, batch.input_ids, batch.position_ids, keep)
            else:
                logits, *states = outputs
                self.taps.captured = dict(zip(self.taps.boundaries, states, strict=True))
        return logits if logits_index is None else logits[: len(logits_index)]

    def _run_captured(
        self, batch: ForwardBatch, segments: torch.Tensor | None, *, lasting: bool
    ) -> Sequence[torch.Tensor] | None:
        """Logits and captured states, by a CUDA graph; None if there is none for such a batch."""
        return None if self.graphs is None or segments is not None else self.graphs.replay(batch, lasting=lasting)

    def _run_compiled(
        self, batch: ForwardBatch, segments: torch.Tensor | None, states: StateBatch | None
    ) -> Sequence[torch.Tensor] | None:
        """The same, by what was compiled for such a batch; None if nothing was."""
        if segments is not None:
            adapted = self.compiled_adapted
            return None if adapted is None else adapted.over_tensors(*batch.step_inputs, segments)
        if self.compiled is None:
            return None
        return self.compiled.over_tensors(*batch.step_inputs, *([] if states is None else [states.plan]))

    def _states_of(self, rows: Sequence[ForwardRow]) -> AbstractContextManager[StateBatch | None]:
        return nullcontext() if self.states is None else self.states.running(rows)

    def _adapters_of(self, segments: torch.Tensor | None) -> AbstractContextManager[None]:
        return nullcontext() if segments is None or self.adapters is None else self.adapters.applied(segments)

    def step(
        self, batch: TensorBatch, ids: torch.Tensor, logits_index: torch.Tensor, state_rows: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """A forward with native attention over tensors alone.

        Args:
            batch: the batch.
            ids: int64 [T].
            logits_index: int64 [L].
            state_rows: `StateBatch.plan`, if the model has recurrent state.

        Returns:
            Logits [L, vocabulary], then the captured states [T, hidden] in the order of the taps' boundaries.
        """
        states = self.states
        with nullcontext() if states is None or state_rows is None else states.over(TracedRows(state_rows)):
            logits = self._run_model(batch, ids[None], batch.positions[None], logits_index)
        return [logits, *self.captured_states]

    def run_tensors(
        self,
        positions: torch.Tensor,
        plan: torch.Tensor,
        write_slots: torch.Tensor,
        ids: torch.Tensor,
        logits_index: torch.Tensor,
        *state_rows: torch.Tensor,
    ) -> Sequence[torch.Tensor]:
        """The same, by the compiled forward if there is one; a CUDA graph can hold it."""
        if self.compiled is not None:
            return self.compiled.over_tensors(positions, plan, write_slots, ids, logits_index, *state_rows)
        return self.step(TensorBatch(positions, plan, write_slots, self.cache_tensors), ids, logits_index, *state_rows)

    @torch.inference_mode()
    def over_batch(
        self, batch: ForwardBatch | TensorBatch, ids: torch.Tensor, logits_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [L, vocabulary] of a batch whose ids [T] are not the batch's own; all of them without an index [L]."""
        index = torch.arange(len(ids), device=ids.device, dtype=torch.long) if logits_index is None else logits_index
        if isinstance(batch, TensorBatch):
            positions, plan, slots = batch.positions, batch.plan, batch.write_slots
        elif batch.is_native:
            positions, plan, slots, *_ = batch.step_inputs
        else:
            return self._run_model(batch, ids[None], batch.position_ids, index)
        return self.run_tensors(positions, plan, slots, ids, index)[0]

    def keep(self, slot: int, path: Sequence[int]) -> None:
        """After verification: a row's recurrent state goes on over its last token and these nodes of its draft alone."""
        if self.states is not None:
            self.states.keep(slot, [0, *(1 + node for node in path)])

    def fork(self, source: int, destination: int) -> None:
        """Gives a row the recurrent state of another one, before the last token that this has run."""
        if self.states is not None:
            self.states.copy(source, destination)

    def _run_model(
        self, batch: AttendedBatch, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: int | torch.Tensor
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
    def rank(self) -> int:
        """This process's number among those that share the model."""
        return 0

    @property
    def num_ranks(self) -> int:
        """How many processes share the model."""
        return 1

    def worst(self, value: float) -> float:
        """The largest of the values that the processes which share the model give at the same time.

        What decides how a forward runs goes through this: their sums over each other must come in the same order.
        """
        return value

    @property
    def captured_states(self) -> list[torch.Tensor]:
        """The captured states of the last forward, in the order of the taps' boundaries."""
        return [self.taps.captured[boundary] for boundary in self.taps.boundaries]

    @property
    def attends_natively(self) -> bool:
        """Whether attention is native, as a compiled forward needs it."""
        return can_attend_natively(self.cache)

    @property
    def cache_tensors(self) -> list[torch.Tensor]:
        """Keys and values, layer by layer."""
        return tensors_of(self.cache)

    def close(self) -> None:
        """Takes hooks and cache references off the model."""
        self.compiled = self.compiled_adapted = self.adapters = None
        self.graphs = None
        self.taps.remove()
        for call in self.architecture.calls:
            self.model.get_submodule(call.module).__dict__.pop(SITE, None)
        self.sites.clear()
        if self.states is not None:
            self.states.close()
            self.states = None
