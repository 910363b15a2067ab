"""Drafting several tokens in a row: a forward over what is new in every row, then rounds of one token a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch

from specplug.model.device import to_device
from specplug.model.kv_cache import KVCache
from specplug.model.paged import PagedBatch
from specplug.model.rows import ForwardRow

LoopStep = Callable[..., tuple[Sequence[torch.Tensor], torch.Tensor]]
"""`(batch, …) -> (state, output)`, both per row."""


class DraftLoop:
    """See `Resources.compile_loop`. This one launches everything from Python.

    Args:
        begin: the first step, over what is new.
        step: one round.
        cache: the KV cache of the batches.
        most: outputs of a row, at most.
        inputs: what `begin` reads, [N, …] each.
    """

    def __init__(
        self, begin: LoopStep, step: LoopStep, cache: KVCache, most: int, inputs: Sequence[torch.Tensor] = ()
    ) -> None:
        self._begin = begin
        self._step = step
        self._cache = cache
        self._most = most
        self._inputs = list(inputs)

    def __call__(
        self, rows: Sequence[ForwardRow], counts: Sequence[int], places: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Runs the new tokens of every row, and drafts. Rows with many new tokens, such as prompts, run apart from the others.

        Args:
            rows: R rows with their new tokens.
            counts: how many outputs each row needs; one without any is run all the same.
            places: for each row, where its entries of the inputs begin.

        Returns:
            The outputs, [at least the most of counts, R, …]. What is beyond a row's count has no meaning.
        """
        counts = [max(count, 1) for count in counts]
        many = [len(row.tokens) > 1 + self._most for row in rows]
        # By falling counts: the rows of every round are the first ones of its run.
        order = sorted(range(len(rows)), key=lambda row: (many[row], -counts[row]))
        few = len(rows) - sum(many)
        runs = []
        for chosen in filter(None, (order[:few], order[few:])):
            given = None if places is None else [places[row] for row in chosen]
            runs.append(self._run([rows[row] for row in chosen], [counts[row] for row in chosen], given))
            if 0 < few < len(rows):
                runs[-1] = runs[-1].clone()  # the next run may overwrite it
        outputs = runs[0] if len(runs) == 1 else _side_by_side(runs)
        if order == list(range(len(rows))):
            return outputs
        back = sorted(range(len(order)), key=order.__getitem__)
        return outputs[:, to_device(back, outputs.device)]

    def _run(self, rows: Sequence[ForwardRow], counts: Sequence[int], places: Sequence[int] | None) -> torch.Tensor:
        """The same for rows that are sorted by falling counts."""
        rows = [_read(row) for row in rows]
        batch = PagedBatch(rows, self._cache)
        if upcoming := next((row.upcoming for row in rows if row.upcoming is not None), None):
            upcoming.fill(batch.input_ids)
        index = to_device(entries(rows, places), self._cache.device) if self._inputs else None
        state, output = self._begin(batch, batch.input_ids, batch.last, *(part[index] for part in self._inputs))
        levels = output.new_zeros(counts[0], *output.shape)
        levels[0] = output
        for number in range(1, counts[0]):
            going = rows_of_round(rows, counts, number)
            state, output = self._step(PagedBatch(going, self._cache), *(part[: len(going)] for part in state))
            levels[number, : len(going)] = output
        return levels


def _read(row: ForwardRow) -> ForwardRow:
    """A row whose number of tokens the host must know; waits for it unless that is certain."""
    if row.upcoming is None or not row.spare:
        return row
    known = row.tokens[: len(row.tokens) - len(row.upcoming)]
    return attrs.evolve(row, tokens=[*known, *row.upcoming.read()], upcoming=None)


def _side_by_side(runs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Outputs [K, R, …] of several runs as one; shorter ones are padded."""
    longest = max(len(run) for run in runs)
    padded = [torch.cat([run, run.new_zeros(longest - len(run), *run.shape[1:])]) for run in runs]
    return torch.cat(padded, dim=1)


def plain_loop(
    begin: LoopStep, step: LoopStep, kv_cache: KVCache, most: int, inputs: Sequence[torch.Tensor] = ()
) -> DraftLoop:
    """The `Resources.compile_loop` of an engine that compiles nothing."""
    return DraftLoop(begin, step, kv_cache, most, inputs)


def entries(rows: Sequence[ForwardRow], places: Sequence[int] | None) -> list[int]:
    """The index of every new token's entry in the inputs."""
    assert places is not None, "a loop with inputs needs to be told where each row's entries are"
    return [place + token for row, place in zip(rows, places, strict=True) for token in range(len(row.tokens))]


def rows_of_round(rows: Sequence[ForwardRow], counts: Sequence[int], number: int) -> list[ForwardRow]:
    """The rows that have an output after round `number`, each with the entry after its last one: the first it may have."""
    return [
        ForwardRow((0,), end_of(row) + number - 1, row.table, first=row.first, upcoming=row.upcoming)
        for row, count in zip(rows, counts, strict=True)
        if count > number
    ]


def end_of(row: ForwardRow) -> int:
    """The entry after the last token that is certain to come."""
    return row.start + len(row.tokens) - row.spare
