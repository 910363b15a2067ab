"""A speculator's own step in CUDA graphs, one per number of tokens: one launch and a few copies, not a hundred launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from specplug.model.cuda_graphs import LONGEST_PLAN, capture, token_buckets
from specplug.model.paged import PagedBatch, stage
from specplug.model.staging import StagedInputs

MOST_CAPTURED = 64
_BUCKETS = token_buckets(MOST_CAPTURED)
CAPTURED_TOKENS = sum(_BUCKETS)
"""Tokens of the largest captured batch, and of all captured batches together: so many outputs are held."""
Outputs = list[torch.Tensor]
TensorStep = Callable[..., Sequence[torch.Tensor]]


@attrs.frozen(eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    outputs: Outputs


class CapturedStep:
    """Callable in place of the step it was made of; see `CudaGraphs`, which does the same for a model's forward.

    Args:
        step: called as `step(batch, *inputs)` for batches that are too large to be captured.
        over_tensors: the same over tensors alone: positions, plan, write slots and the inputs.
        inputs: examples, whose first dimension is free.
        device: the GPU.

    Raises:
        RuntimeError: the step does something that cannot be captured.
    """

    def __init__(
        self,
        step: TensorStep,
        over_tensors: TensorStep,
        inputs: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        self._step = step
        self._staged = StagedInputs(MOST_CAPTURED, LONGEST_PLAN, device)
        self._inputs = [tensor.new_zeros(MOST_CAPTURED, *tensor.shape[1:], device=device) for tensor in inputs]
        for own, example in zip(self._inputs, inputs, strict=True):
            if len(example):
                own.copy_(example[:1].expand_as(own))  # padding is of an allowed kind, an id of a table say
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)
        self._captured = {bucket: self._capture(over_tensors, bucket, pool, stream) for bucket in reversed(_BUCKETS)}
        torch.cuda.synchronize(device)

    @torch.inference_mode()
    def _capture(self, over_tensors: TensorStep, bucket: int, pool: Any, stream: torch.cuda.Stream) -> _Captured:
        _, positions, slots, _, plan = self._staged.tensors(bucket)
        inputs = [tensor[:bucket] for tensor in self._inputs]

        def run() -> Outputs:
            return list(over_tensors(positions, plan, slots, *inputs))

        return _Captured(*capture(run, self._staged, bucket, pool, stream))

    def __call__(self, batch: PagedBatch, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """See `Resources.compile`; what is returned outlives later calls."""
        tokens = batch.num_tokens
        bucket = next((size for size in _BUCKETS if size >= tokens), None)
        if bucket is None or not stage(batch, self._staged, bucket):
            return self._step(batch, *inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own[:tokens].copy_(given)
        captured = self._captured[bucket]
        captured.graph.replay()
        self._staged.mark_read()
        return [output[:tokens].clone() for output in captured.outputs]
