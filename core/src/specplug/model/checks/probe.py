"""The forwards of the parity probe, and what each layer with recurrent state gives in them.

Rows run together: a prompt, then a few tokens at a time. Where the model has recurrent state, the tokens of a step are the
accepted path of a draft tree with wrong nodes around it, so that a state that was brought over a rejected node shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch

from specplug.model.checks.difference import relative_difference
from specplug.model.kv_cache import BlockTable
from specplug.model.recurrent.memory import Function, StateMemory, bind
from specplug.model.rows import ForwardRow, TreeMask
from specplug.model.runner import ModelRunner

MOST_HELD = 8
"""Tokens of a row in one step of the probe, at most."""
_STEPS = (1, 3, 1)  # tokens of the steps after prefill: decoding, verification


@attrs.frozen(eq=False)
class ProbeRow:
    """One row of a step.

    Attributes:
        number: of the row.
        row: what runs.
        offsets: those of its tokens that are the row's own.
        positions: where these are in the row.
    """

    number: int
    row: ForwardRow
    offsets: Sequence[int]
    positions: Sequence[int]


def packed(step: Sequence[ProbeRow]) -> list[int]:
    """The packed indices of a step's own tokens."""
    index, first = [], 0
    for row in step:
        index += [first + offset for offset in row.offsets]
        first += len(row.row.tokens)
    return index


def spare_tokens(runner: ModelRunner) -> int:
    """KV entries of a row after its tokens, for wrong ones."""
    return 0 if runner.states is None else min(MOST_HELD, runner.states.held)


def probe_steps(runner: ModelRunner, rows: Sequence[list[int]], block_size: int) -> Iterator[list[ProbeRow]]:
    """The forwards that run some rows together; each must be run before the next one is asked for.

    Args:
        runner: the model; its KV cache has room for the rows and `spare_tokens` of each.
        rows: their ids.
        block_size: tokens of a KV block.
    """
    blocks_each = -(-(max(len(ids) for ids in rows) + spare_tokens(runner)) // block_size)
    tables = []
    for number in range(len(rows)):
        tables.append(BlockTable(block_size))
        tables[-1].extend(range(number * blocks_each, (number + 1) * blocks_each))
    starts = [0] * len(rows)
    for count in (None, *_STEPS):
        step = []
        for number, ids in enumerate(rows):
            tokens = ids[starts[number] :][: max(1, len(ids) - sum(_STEPS)) if count is None else count]
            if tokens:
                wrong = count is not None and runner.states is not None and spare_tokens(runner) > len(tokens) + 1
                step.append(_row(number, tokens, starts[number], tables[number], among_wrong=wrong))
            starts[number] += len(tokens)
        if step:
            yield step
            for row in step:
                _settle(runner, row)


def _row(number: int, tokens: list[int], start: int, table: BlockTable, *, among_wrong: bool) -> ProbeRow:
    positions = range(start, start + len(tokens))
    if not among_wrong:
        return ProbeRow(number, ForwardRow(tokens, start, table, slot=number, held=1), range(len(tokens)), positions)
    wrong = tokens[0]
    nodes = [wrong, *tokens[1:], wrong]
    parents = [-1, -1, *range(1, len(nodes) - 1)]
    if len(tokens) == 1:
        parents = [-1, 0]
    tree = TreeMask.from_parents(start, parents)
    row = ForwardRow([tokens[0], *nodes], start, table, tree, slot=number, held=1 + len(nodes))
    return ProbeRow(number, row, [0, *range(2, 1 + len(tokens))], positions)


def _settle(runner: ModelRunner, row: ProbeRow) -> None:
    """Drops the wrong nodes."""
    if row.row.tree is None or runner.states is None:
        return
    runner.states.keep(row.row.slot, row.offsets)
    slots = row.row.table.slots(row.row.start, row.row.start + len(row.row.tokens))
    moves = [(slots[offset], slots[place]) for place, offset in enumerate(row.offsets) if offset != place]
    runner.cache.move([source for source, _ in moves], [destination for _, destination in moves])


@torch.inference_mode()
def measure_states(runner: ModelRunner, rows: Sequence[list[int]], block_size: int) -> list[tuple[str, float]]:
    """Per call that carries state, the difference of its results to those of its own function in float32.

    Args:
        runner: the model.
        rows: the ids of some rows.
        block_size: tokens of a KV block.

    Returns:
        (module, largest relative root-mean-square difference of a row).
    """
    if runner.states is None:
        return []
    watches = [_Watch(memory) for memory in runner.states.memories]
    try:
        for step in probe_steps(runner, rows, block_size):
            for watch in watches:
                watch.step = step
            runner.forward([row.row for row in step])
    finally:
        for watch in watches:
            watch.remove()
    return [
        (call.module, watch.compare()) for call, watch in zip(runner.architecture.state_calls, watches, strict=True)
    ]


class _Watch:
    """Collects a memory's inputs and results of the rows' own tokens."""

    def __init__(self, memory: StateMemory) -> None:
        self.step: list[ProbeRow] = []
        self._memory = memory
        self._seen: dict[int, list[tuple[dict[str, Any], torch.Tensor]]] = {}
        self._original: Function = memory.run
        memory.run = self._run  # type: ignore[method-assign]

    def remove(self) -> None:
        """Lets the memory be."""
        del self._memory.run

    def _run(self, batch: Any, original: Function, *args: Any, **kwargs: Any) -> Any:
        run = type(self._memory).run
        self._original = original
        given = bind(original, args, kwargs)
        result = run(self._memory, batch, original, *args, **kwargs)
        first = 0
        for row in self.step:
            places = [first + offset for offset in row.offsets]
            index = torch.tensor(places, dtype=torch.long, device=self._output(result).device)
            own = {name: value.index_select(self._memory.axis, index) for name, value in self._sequences(given).items()}
            out = self._output(result).index_select(self._memory.axis, index)
            self._seen.setdefault(row.number, []).append(({**given, **own}, out))
            first += len(row.row.tokens)
        return result

    def _sequences(self, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {name: given[name] for name in self._memory.sequences if given.get(name) is not None}

    @staticmethod
    def _output(result: Any) -> torch.Tensor:
        return result[0] if isinstance(result, tuple) else result

    def compare(self) -> float:
        """The largest difference of a row."""
        worst = 0.0
        for steps in self._seen.values():
            given = dict(steps[-1][0])
            for name in self._sequences(given):
                given[name] = torch.cat([inputs[name] for inputs, _ in steps], dim=self._memory.axis)
            wide = {name: _widened(value) for name, value in given.items()}
            theirs = self._output(self._original(**wide))
            ours = torch.cat([out for _, out in steps], dim=self._memory.axis)
            worst = max(worst, relative_difference(ours, theirs))
        return worst


def _widened(value: Any) -> Any:
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_floating else value
