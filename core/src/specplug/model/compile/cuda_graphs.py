"""A model's forward as CUDA graphs, one per number of tokens: a step is one launch.

A graph replays what was captured, over the memory it was captured with. Inputs therefore lie in one buffer at a fixed address,
and the copy that fills it is the graph's first part. The batch is padded to the next captured number of tokens, and the
attention plan says how many are real: padding is attended to by nobody and stored nowhere. The next replay overwrites outputs:
who keeps them longer gets copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch

from specplug.model.staging import StagedInputs, staged_length

if TYPE_CHECKING:
    from specplug.model.batch import ForwardBatch
    from specplug.model.runner import ModelRunner

MOST_TOKENS = 256
LONGEST_PLAN = 1 << 17
_NO_WORK = [[0, 0, 1, 4, 0, 0, 0, 0]]
"""The plan of a batch without rows."""
Outputs = tuple[torch.Tensor, dict[int | str, torch.Tensor]]
T = TypeVar("T")


def token_buckets(limit: int) -> list[int]:
    """The numbers of tokens that are captured, up to a limit: 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, …"""
    buckets, size = [1, 2], 4
    while size < limit:
        buckets += [size, size * 3 // 2]
        size *= 2
    return [*(bucket for bucket in buckets if bucket < limit), limit]


def capture(
    run: Callable[[], T], inputs: StagedInputs, bucket: int, pool: Any, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of one run over staged inputs, which it fetches first, and what that run returns.

    Args:
        run: reads `inputs.tensors(bucket)`; a batch without rows is staged while it is captured.
        inputs: where what the host writes lies.
        bucket: tokens.
        pool: the memory pool that the graphs share.
        stream: to capture on.
    """
    inputs.write([[], [], [], []], bucket, _NO_WORK)
    inputs.copy(bucket)
    torch.cuda.synchronize(stream.device)
    with torch.cuda.stream(stream):  # compiles kernels and fills libraries' workspaces, which a capture must not
        run()
    torch.cuda.synchronize(stream.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        inputs.copy(bucket)
        outputs = run()
    return graph, outputs


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
        self._inputs = StagedInputs(self._buckets[-1], LONGEST_PLAN, runner.device)
        self._captured: dict[int, _Captured] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(runner.device)
        for bucket in reversed(self._buckets):
            self._captured[bucket] = self._capture(runner, bucket, pool, stream)
        torch.cuda.synchronize(runner.device)

    @torch.inference_mode()
    def _capture(self, runner: ModelRunner, bucket: int, pool: Any, stream: torch.cuda.Stream) -> _Captured:
        ids, positions, slots, index, plan = self._inputs.tensors(bucket)

        def run() -> Outputs:
            return runner.run_tensors(ids[None], positions[None], plan, slots, index)

        return _Captured(*capture(run, self._inputs, bucket, pool, stream))

    def replay(self, batch: ForwardBatch, *, lasting: bool) -> Outputs | None:
        """Logits [L, vocabulary] and captured states [T, hidden] of a batch; None if it is too large.

        Args:
            batch: the batch.
            lasting: whether the outputs are to outlive the next replay.
        """
        tokens = batch.num_tokens
        if tokens > self._buckets[-1] or batch.num_logits > tokens:
            return None
        bucket = next(size for size in self._buckets if size >= tokens)
        if not batch.stage(self._inputs, bucket):
            return None
        captured = self._captured[bucket]
        captured.graph.replay()
        self._inputs.mark_read()
        logits, states = captured.outputs
        logits, states = logits[: batch.num_logits], {boundary: state[:tokens] for boundary, state in states.items()}
        if lasting:
            return logits.clone(), {boundary: state.clone() for boundary, state in states.items()}
        return logits, states

    @staticmethod
    def planned_bytes(most_tokens: int, token_bytes: int, output_bytes: int, scratch_bytes: int) -> int:
        """Bytes of one model's graphs; a pool serves all of its graphs, and no other's.

        Args:
            most_tokens: as above.
            token_bytes: what a token takes while a forward runs.
            output_bytes: what it leaves: logits and captured states.
            scratch_bytes: what the largest forward takes besides.
        """
        buckets = token_buckets(min(most_tokens, MOST_TOKENS))
        inputs = staged_length(buckets[-1], LONGEST_PLAN) * torch.int32.itemsize
        return inputs + scratch_bytes + buckets[-1] * token_bytes + sum(buckets) * output_bytes
