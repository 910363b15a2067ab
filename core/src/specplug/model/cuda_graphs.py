"""A model's forward as CUDA graphs, one per number of tokens: a step is one copy and one launch.

A graph replays the kernels that were captured, over the memory they were captured with. Inputs therefore lie in one buffer at
a fixed address; the batch is padded to the next captured number of tokens, and the attention plan says how many are real:
padding is attended to by nobody and stored nowhere. Outputs are copied out, since the next replay overwrites them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from specplug.model.staging import split_buffer, stage, staged_length

if TYPE_CHECKING:
    from specplug.model.forward import ForwardBatch
    from specplug.model.runner import ModelRunner

MOST_TOKENS = 256
_LONGEST_PLAN = 1 << 17
Outputs = tuple[torch.Tensor, dict[int | str, torch.Tensor]]


def token_buckets(limit: int) -> list[int]:
    """The numbers of tokens that are captured, up to a limit: 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, …"""
    buckets, size = [1, 2], 4
    while size < limit:
        buckets += [size, size * 3 // 2]
        size *= 2
    return [*(bucket for bucket in buckets if bucket < limit), limit]


@attrs.frozen(eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    outputs: Outputs


class CudaGraphs:
    """The captured forwards of one runner.

    Args:
        runner: with native attention, compiled or not.
        most_tokens: of a batch that is worth capturing.

    Raises:
        RuntimeError: the model does something that cannot be captured.
    """

    def __init__(self, runner: ModelRunner, most_tokens: int) -> None:
        self._buckets = token_buckets(min(most_tokens, MOST_TOKENS))
        self._device = runner.device
        length = staged_length(self._buckets[-1], self._buckets[-1], _LONGEST_PLAN)
        self._buffer = torch.zeros(length, dtype=torch.int32, device=runner.device)
        self._captured: dict[int, _Captured] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(runner.device)
        for bucket in reversed(self._buckets):
            self._captured[bucket] = self._capture(runner, bucket, pool, stream)
        torch.cuda.synchronize(runner.device)

    @torch.inference_mode()
    def _capture(self, runner: ModelRunner, bucket: int, pool: Any, stream: torch.cuda.Stream) -> _Captured:
        empty = np.array([0, 0, 1, 4, 0, 0, 0, 0], dtype=np.int32)  # no rows, no work
        stage([[], [], [], []], empty, self._device, self._buffer, bucket)
        inputs = self._inputs(bucket)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(stream):  # compiles kernels and fills libraries' workspaces, which a capture must not
            runner.run_tensors(*inputs)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            outputs = runner.run_tensors(*inputs)
        return _Captured(graph, outputs)

    def _inputs(self, bucket: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, positions, slots, index, plan = split_buffer(self._buffer, [bucket] * 4)
        return ids[None], positions[None], plan[:_LONGEST_PLAN], slots, index

    def replay(self, batch: ForwardBatch) -> Outputs | None:
        """Logits [L, vocabulary] and captured states [T, hidden] of a batch; None if it is too large."""
        tokens = batch.num_tokens
        if tokens > self._buckets[-1] or batch.num_logits > tokens:
            return None
        bucket = next(size for size in self._buckets if size >= tokens)
        if not batch.stage(self._buffer, bucket, _LONGEST_PLAN):
            return None
        captured = self._captured[bucket]
        captured.graph.replay()
        logits, states = captured.outputs
        copies = {boundary: state[:tokens].clone() for boundary, state in states.items()}
        return logits[: batch.num_logits].clone(), copies

    @staticmethod
    def planned_bytes(most_tokens: int, token_bytes: int, output_bytes: int) -> int:
        """Bytes of the graphs' memory.

        Args:
            most_tokens: as above.
            token_bytes: what a token takes while a forward runs.
            output_bytes: what it leaves: logits and captured states.
        """
        buckets = token_buckets(min(most_tokens, MOST_TOKENS))
        return buckets[-1] * token_bytes + sum(buckets) * output_bytes
