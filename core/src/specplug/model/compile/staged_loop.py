"""Drafting over tensors that lie at fixed addresses: what CUDA graphs of loops hold (`loops.py`).

All inputs are known before the first token is drafted, and are copied at once: the new tokens of every row, the positions,
slots and attention plans of every round. How many of a row's new tokens count may not be known (`ForwardRow.upcoming`). It is
then read on the device, and moves the row's rounds on by as many entries: their positions, slots, and lengths in the plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import attrs
import numpy as np
import torch

from specplug.model.attention.plan import PLAN_HEADER, PLAN_ROW, scheduled_plan
from specplug.model.compile.trace import TensorBatch, tensors_of
from specplug.model.kv_cache import KVCache
from specplug.model.loop import DraftLoop, LoopStep, end_of, entries, rows_of_round
from specplug.model.pending import PendingTokens
from specplug.model.rows import ForwardRow
from specplug.native.gpu.sizes import wanted_items


@attrs.frozen(eq=False)
class LoopLayout:
    """Where the inputs of a loop are in its buffer, as int32 elements: lists of int64 first, then one plan per round.

    Attributes:
        rows: of the loop.
        tokens: new tokens of all rows.
        rounds: after the first forward.
    """

    rows: int
    tokens: int
    rounds: int

    @property
    def ahead(self) -> int:
        """Slots of a row that its rounds may use."""
        return self.rounds + self.tokens // self.rows - 1

    @property
    def sizes(self) -> list[int]:
        """Ids, positions, slots and entries of the new tokens; for each row, how many outputs it needs, its last token that is
        certain to come, where the number of others is found (-1 if there are none), the position after it, and the slots from
        there on.
        """
        return [self.tokens] * 4 + [self.rows] * 4 + [self.rows * self.ahead]

    @property
    def paddings(self) -> tuple[int, ...]:
        """What each list is padded with."""
        return (0, 0, -1, 0, 0, 0, -1, 0, -1)

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

    def plans(self, buffer: torch.Tensor) -> torch.Tensor:
        """The plans, one after the other."""
        return buffer[2 * sum(self.sizes) : self.length].view(1 + self.rounds, self.plan_length)


class StagedLoop(DraftLoop):
    """A loop over a buffer; for the other arguments see `DraftLoop`. Attention is native.

    Args:
        buckets: numbers of rows that it is staged for, ascending; more rows run from Python.
        accepted: where the tokens of `ForwardRow.upcoming` are.
    """

    def __init__(
        self,
        begin: LoopStep,
        step: LoopStep,
        cache: KVCache,
        most: int,
        inputs: Sequence[torch.Tensor],
        buckets: Sequence[int],
        accepted: PendingTokens | None,
    ) -> None:
        super().__init__(begin, step, cache, most, inputs)
        self._accepted = accepted
        self._buckets = list(buckets)
        length = self._layout(self._buckets[-1], most).length
        self._buffer = torch.zeros(length, dtype=torch.int32, device=cache.device)
        self._host = torch.zeros(length, dtype=torch.int32, device="cpu", pin_memory=cache.device.type == "cuda")
        self._numbers = self._host.numpy()
        self._wanted = wanted_items(cache.most_heads, cache.device)

    def _layout(self, rows: int, count: int) -> LoopLayout:
        """Of so many rows and outputs."""
        return LoopLayout(rows, rows * (1 + self._most), count - 1)

    def _run(self, rows: Sequence[ForwardRow], counts: Sequence[int], places: Sequence[int] | None) -> torch.Tensor:
        bucket = next((size for size in self._buckets if size >= len(rows)), None)
        tokens = sum(len(row.tokens) for row in rows)
        layout = None if bucket is None else self._layout(bucket, counts[0])
        if (
            layout is None
            or counts[0] > self._most
            or tokens > layout.tokens
            or not self._stage(layout, rows, counts, places)
        ):
            return super()._run(rows, counts, places)
        return self._launch(layout)[:, : len(rows)]

    def _launch(self, layout: LoopLayout) -> torch.Tensor:
        """The outputs of what is staged."""
        self._copy(layout)
        return self._steps(layout)

    def _copy(self, layout: LoopLayout) -> None:
        self._buffer[: layout.length].copy_(self._host[: layout.length], non_blocking=True)

    def _wait(self) -> None:
        """Waits until the device has taken the inputs of the launch before."""

    def _steps(self, layout: LoopLayout) -> torch.Tensor:
        ids, positions, slots, places, outputs, last, found, after, ahead = layout.longs(self._buffer)
        plan, *plans = layout.plans(self._buffer)
        rounds = torch.arange(layout.rounds, device=ids.device, dtype=torch.int64)[:, None]
        goes_on = outputs > rounds + 1
        more = torch.zeros_like(after)
        if self._accepted is not None:
            self._accepted.fill(ids)
            more = self._accepted.at(found, 0)
            lengthen(layout.plans(self._buffer)[1:], torch.where(goes_on, more, 0))
        last, positions_of = last + more, after + more + rounds
        slots_of = ahead.view(layout.rows, layout.ahead).t().gather(0, more + rounds)
        slots_of = torch.where(goes_on, slots_of, -1)
        caches = tensors_of(self._cache)
        batch = TensorBatch(positions, plan, slots, caches)
        state, output = self._begin(batch, ids, last, *(part[places] for part in self._inputs))
        levels = [output]
        for plan, positions, slots in zip(plans, positions_of, slots_of, strict=True):
            state, output = self._step(TensorBatch(positions, plan, slots, caches), *state)
            levels.append(output)
        return torch.stack(levels)

    def _write(
        self, layout: LoopLayout, longs: Sequence[Sequence[int]], plans: Sequence[Sequence[list[int] | np.ndarray]]
    ) -> bool:
        """Writes a graph's inputs into the pinned memory; False if a plan does not fit."""
        if any(sum(len(piece) for piece in plan) > layout.plan_length for plan in plans):
            return False
        self._wait()
        flat: list[int] = []
        for values, size, padding in zip(longs, layout.sizes, layout.paddings, strict=True):
            flat += values
            flat += [padding] * (size - len(values))
        self._numbers[: 2 * len(flat)].view(np.int64)[:] = flat
        begin = 2 * len(flat)
        for plan in plans:
            at = begin
            for piece in plan:
                self._numbers[at : at + len(piece)] = piece
                at += len(piece)
            begin += layout.plan_length
        return True

    def _stage(
        self, layout: LoopLayout, rows: Sequence[ForwardRow], counts: Sequence[int], places: Sequence[int] | None
    ) -> bool:
        tokens = [token for row in rows for token in row.tokens]
        positions = [position for row in rows for position in row.positions]
        slots = [slot for row in rows for slot in row.table.slots(row.start, row.start + len(row.tokens))]
        ends = accumulate(len(row.tokens) for row in rows)
        last = [end - 1 - row.spare for end, row in zip(ends, rows, strict=True)]
        found = [-1 if row.upcoming is None else row.upcoming.count_entry for row in rows]
        after = [end_of(row) for row in rows]
        ahead: list[int] = []
        for row, count, begin in zip(rows, counts, after, strict=True):
            own = row.table.slots(begin, begin + count - 1 + row.spare) if count > 1 else ()
            ahead += own
            ahead += [-1] * (layout.ahead - len(own))
        of_tokens = [tokens, positions, slots, entries(rows, places) if self._inputs else ()]
        longs = [*of_tokens, counts, last, found, after, ahead]
        rounds = [rows_of_round(rows, counts, number) for number in range(1, counts[0])]
        plans = [scheduled_plan(going, layout.rows, self._wanted) for going in rounds]
        return self._write(layout, longs, [scheduled_plan(rows, layout.tokens, self._wanted), *plans])


def lengthen(plans: torch.Tensor, more: torch.Tensor) -> None:
    """Adds entries to the rows of attention plans, in place: a row of one token then attends to as many more.

    Args:
        plans: int32 [plans, length].
        more: int64 [plans, rows]; 0 for rows that a plan does not have.
    """
    rows = more.shape[1]
    fields = plans[:, PLAN_HEADER : PLAN_HEADER + len(PLAN_ROW) * rows].unflatten(1, (rows, len(PLAN_ROW)))
    for name in ("length", "prefix"):
        fields[..., PLAN_ROW.index(name)] += more.to(torch.int32)
