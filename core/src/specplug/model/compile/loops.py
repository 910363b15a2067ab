"""Drafting as CUDA graphs, one per numbers of rows and of tokens: one launch, and one wait for what was drafted.

A graph is captured for as many new tokens as verification can leave a row; rows with more run the same steps from Python.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import attrs
import torch

from specplug.model.batch import can_attend_natively
from specplug.model.checks.difference import relative_difference
from specplug.model.compile.artifacts import CompileError, as_compile_error
from specplug.model.compile.compiled import check_change
from specplug.model.compile.cuda_graphs import MOST_CAPTURED, NO_WORK, token_buckets
from specplug.model.compile.staged_loop import LoopLayout, StagedLoop
from specplug.model.kv_cache import BlockTable, KVCache
from specplug.model.loop import DraftLoop, LoopStep, plain_loop
from specplug.model.pending import PendingTokens
from specplug.model.rows import ForwardRow

logger = logging.getLogger("specplug")


@attrs.frozen(eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    outputs: torch.Tensor


class CapturedLoop(StagedLoop):
    """A loop as CUDA graphs; for the other arguments see `StagedLoop`. Its cache is on a GPU.

    Args:
        most_rows: of a batch; up to `MOST_CAPTURED` are captured.

    Raises:
        RuntimeError: a step does something that cannot be captured.
    """

    def __init__(
        self,
        begin: LoopStep,
        step: LoopStep,
        cache: KVCache,
        most: int,
        inputs: Sequence[torch.Tensor] = (),
        most_rows: int = MOST_CAPTURED,
        accepted: PendingTokens | None = None,
    ) -> None:
        super().__init__(begin, step, cache, most, inputs, token_buckets(min(most_rows, MOST_CAPTURED)), accepted)
        self._read = torch.cuda.Event()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(cache.device)
        self._captured: dict[tuple[int, int], _Captured] = {}
        for bucket in reversed(self._buckets):
            for count in range(most, 0, -1):
                self._captured[bucket, count] = self._capture(self._layout(bucket, count), pool, stream)
        torch.cuda.synchronize(cache.device)

    @torch.inference_mode()
    def _capture(self, layout: LoopLayout, pool: Any, stream: torch.cuda.Stream) -> _Captured:
        """A graph; a batch without rows is staged meanwhile."""
        self._write(layout, [()] * len(layout.sizes), [NO_WORK] * (1 + layout.rounds))
        self._copy(layout)
        torch.cuda.synchronize(stream.device)
        if 1 + layout.rounds == self._most:
            with torch.cuda.stream(
                stream
            ):  # compiles kernels and fills libraries' workspaces, which a capture must not
                self._steps(layout)
            torch.cuda.synchronize(stream.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = super()._launch(layout)
        return _Captured(graph, outputs)

    def _wait(self) -> None:
        self._read.synchronize()

    def _launch(self, layout: LoopLayout) -> torch.Tensor:
        captured = self._captured[layout.rows, 1 + layout.rounds]
        captured.graph.replay()
        self._read.record(torch.cuda.current_stream(self._buffer.device))
        return captured.outputs


def compile_loop(
    begin: LoopStep,
    step: LoopStep,
    kv_cache: KVCache,
    most: int,
    inputs: Sequence[torch.Tensor] = (),
    *,
    most_rows: int = MOST_CAPTURED,
    accepted: PendingTokens | None = None,
) -> DraftLoop:
    """See `Resources.compile_loop`, and `CapturedLoop`. What cannot be captured is launched from Python."""
    plain = plain_loop(begin, step, kv_cache, most, inputs)
    if kv_cache.device.type != "cuda" or not can_attend_natively(kv_cache):
        return plain
    try:
        with as_compile_error():
            captured = CapturedLoop(begin, step, kv_cache, most, inputs, most_rows, accepted)
            _check(captured, plain, kv_cache)
    except CompileError as error:
        torch.cuda.synchronize(kv_cache.device)
        logger.warning("a speculator's loop runs without CUDA graphs: %s", error)
        return plain
    return captured


@torch.inference_mode()
def _check(captured: DraftLoop, plain: DraftLoop, cache: KVCache) -> None:
    """Compares the first output after one token; the first slots of the KV cache are overwritten."""
    table = BlockTable(1)
    table.extend([0])
    ours, theirs = (loop([ForwardRow([0], 0, table)], [1], [0]).clone() for loop in (captured, plain))
    if ours.is_floating_point():
        check_change("captured, it gives other results", relative_difference(ours, theirs), cache.keys[0].dtype)
