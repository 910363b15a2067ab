"""Drafting as CUDA graphs, one per numbers of rows and of tokens: one launch, and one wait for what was drafted.

A graph begins with the copy of its inputs, which are all known before the first token is: the new tokens of every row, the
positions, slots and attention plans of every round. It is captured for as many new tokens as verification can leave a row;
rows with more go through the same steps from Python.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import attrs
import numpy as np
import torch

from specplug.model.attention.plan import scheduled_plan
from specplug.model.batch import can_attend_natively
from specplug.model.checks.difference import relative_difference
from specplug.model.compile.artifacts import CompileError, as_compile_error
from specplug.model.compile.compiled import check_change
from specplug.model.compile.cuda_graphs import MOST_CAPTURED, NO_WORK, token_buckets
from specplug.model.compile.trace import TensorBatch, tensors_of
from specplug.model.kv_cache import BlockTable, KVCache
from specplug.model.loop import DraftLoop, LoopStep, entries, plain_loop, rows_of_round
from specplug.model.rows import ForwardRow
from specplug.native.gpu.sizes import wanted_items

logger = logging.getLogger("specplug")


@attrs.frozen(eq=False)
class _Layout:
    """Where the inputs of a graph are in its buffer, as int32 elements: lists of int64 first, then one plan per round.

    Attributes:
        rows: of the graph.
        tokens: new tokens of all rows.
        rounds: after the first forward.
    """

    rows: int
    tokens: int
    rounds: int

    @property
    def sizes(self) -> list[int]:
        """Ids, positions, slots and entries of the new tokens, each row's last one; positions and slots of every round."""
        return [self.tokens] * 4 + [self.rows] + [self.rows] * (2 * self.rounds)

    @property
    def plan_length(self) -> int:
        """Room of a plan; rows whose blocks are so scattered that they need more are drafted for from Python."""
        return 4096 + 256 * self.rows

    @property
    def length(self) -> int:
        """Of the whole buffer."""
        return 2 * sum(self.sizes) + (1 + self.rounds) * self.plan_length

    def longs(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The lists."""
        return list(buffer[: 2 * sum(self.sizes)].view(torch.int64).split(self.sizes))

    def plans(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The plans."""
        return list(buffer[2 * sum(self.sizes) : self.length].split(self.plan_length))


@attrs.frozen(eq=False)
class _Captured:
    layout: _Layout
    graph: torch.cuda.CUDAGraph
    outputs: torch.Tensor


class CapturedLoop(DraftLoop):
    """A loop as CUDA graphs; for the other arguments see `DraftLoop`. Its cache is on a GPU, with native attention.

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
    ) -> None:
        super().__init__(begin, step, cache, most, inputs)
        device = cache.device
        self._buckets = token_buckets(min(most_rows, MOST_CAPTURED))
        widest = self._buckets[-1]
        length = _Layout(widest, widest * (1 + most), most - 1).length
        self._buffer = torch.zeros(length, dtype=torch.int32, device=device)
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=True)
        self._numbers = self._host.numpy()
        self._wanted = wanted_items(cache.most_heads, device)
        self._read = torch.cuda.Event()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)
        self._captured = {
            (bucket, count): self._capture(bucket, count, pool, stream)
            for bucket in reversed(self._buckets)
            for count in range(most, 0, -1)
        }
        torch.cuda.synchronize(device)

    @torch.inference_mode()
    def _capture(self, rows: int, count: int, pool: Any, stream: torch.cuda.Stream) -> _Captured:
        """A graph of `count` outputs for so many rows; a batch without rows is staged meanwhile."""
        layout = _Layout(rows, rows * (1 + self._most), count - 1)
        self._write(layout, [[]] * len(layout.sizes), [NO_WORK] * count)
        self._copy(layout)
        torch.cuda.synchronize(stream.device)
        if count == self._most:
            with torch.cuda.stream(
                stream
            ):  # compiles kernels and fills libraries' workspaces, which a capture must not
                self._steps(layout)
            torch.cuda.synchronize(stream.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._copy(layout)
            outputs = self._steps(layout)
        return _Captured(layout, graph, outputs)

    def _copy(self, layout: _Layout) -> None:
        self._buffer[: layout.length].copy_(self._host[: layout.length], non_blocking=True)

    def _steps(self, layout: _Layout) -> torch.Tensor:
        ids, positions, slots, places, last, *rounds = layout.longs(self._buffer)
        plan, *plans = layout.plans(self._buffer)
        caches = tensors_of(self._cache)
        batch = TensorBatch(positions, plan, slots, caches)
        state, output = self._begin(batch, ids, last, *(part[places] for part in self._inputs))
        levels = [output]
        for plan, positions, slots in zip(plans, rounds[::2], rounds[1::2], strict=True):
            state, output = self._step(TensorBatch(positions, plan, slots, caches), *state)
            levels.append(output)
        return torch.stack(levels)

    def _write(
        self, layout: _Layout, longs: Sequence[Sequence[int]], plans: Sequence[Sequence[list[int] | np.ndarray]]
    ) -> bool:
        """Writes a graph's inputs into the pinned memory; False if a plan does not fit."""
        if any(sum(len(piece) for piece in plan) > layout.plan_length for plan in plans):
            return False
        self._read.synchronize()  # passes: the outputs of the call before were waited for
        flat: list[int] = []
        for number, (values, size) in enumerate(zip(longs, layout.sizes, strict=True)):
            is_slots = number == 2 or (number > 5 and number % 2 == 0)
            flat += values
            flat += [-1 if is_slots else 0] * (size - len(values))
        self._numbers[: 2 * len(flat)].view(np.int64)[:] = flat
        begin = 2 * len(flat)
        for plan in plans:
            at = begin
            for piece in plan:
                self._numbers[at : at + len(piece)] = piece
                at += len(piece)
            begin += layout.plan_length
        return True

    def _run(self, rows: Sequence[ForwardRow], counts: Sequence[int], places: Sequence[int] | None) -> torch.Tensor:
        bucket = next((size for size in self._buckets if size >= len(rows)), None)
        tokens = sum(len(row.tokens) for row in rows)
        captured = None if bucket is None else self._captured.get((bucket, counts[0]))
        if (
            captured is None
            or tokens > captured.layout.tokens
            or not self._stage(captured.layout, rows, counts, places)
        ):
            return super()._run(rows, counts, places)
        captured.graph.replay()
        self._read.record(torch.cuda.current_stream(self._buffer.device))
        return captured.outputs[:, : len(rows)]

    def _stage(
        self, layout: _Layout, rows: Sequence[ForwardRow], counts: Sequence[int], places: Sequence[int] | None
    ) -> bool:
        tokens = [token for row in rows for token in row.tokens]
        positions = [position for row in rows for position in row.positions]
        slots = [slot for row in rows for slot in row.table.slots(row.start, row.start + len(row.tokens))]
        last = [end - 1 for end in accumulate(len(row.tokens) for row in rows)]
        longs = [tokens, positions, slots, entries(rows, places) if self._inputs else [], last]
        plans = [scheduled_plan(rows, layout.tokens, self._wanted)]
        for number in range(1, counts[0]):
            going = rows_of_round(rows, counts, number)
            longs += [[row.start for row in going], [row.table.slots(row.start, row.start + 1)[0] for row in going]]
            plans.append(scheduled_plan(going, layout.rows, self._wanted))
        return self._write(layout, longs, plans)


def compile_loop(
    begin: LoopStep,
    step: LoopStep,
    kv_cache: KVCache,
    most: int,
    inputs: Sequence[torch.Tensor] = (),
    *,
    most_rows: int = MOST_CAPTURED,
) -> DraftLoop:
    """See `Resources.compile_loop`; `most_rows` is the most of a batch. What cannot be captured is launched from Python."""
    plain = plain_loop(begin, step, kv_cache, most, inputs)
    if kv_cache.device.type != "cuda" or not can_attend_natively(kv_cache):
        return plain
    try:
        with as_compile_error():
            captured = CapturedLoop(begin, step, kv_cache, most, inputs, most_rows)
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
