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
        """Runs the new tokens of every row, and drafts.

        Of rows with many new tokens, such as prompts, all but the last run first, in a forward of their own.

        Args:
            rows: R rows with their new tokens.
            counts: how many outputs each row needs; one without any is run all the same.
            places: for each row, where its entries of the inputs begin.

        Returns:
            The outputs, [at least the most of counts, R, …]. What is beyond a row's count has no meaning.
        """
        counts = [max(count, 1) for count in counts]
        rows, places = self._run_ahead(rows, places)
        # By falling counts: the rows of every round are the first ones.
        order = sorted(range(len(rows)), key=lambda row: -counts[row])
        given = None if places is None else [places[row] for row in order]
        outputs = self._run([rows[row] for row in order], [counts[row] for row in order], given)
        if order == list(range(len(rows))):
            return outputs
        back = sorted(range(len(order)), key=order.__getitem__)
        return outputs[:, to_device(back, outputs.device)]

    def _run_ahead(
        self, rows: Sequence[ForwardRow], places: Sequence[int] | None
    ) -> tuple[Sequence[ForwardRow], Sequence[int] | None]:
        """Runs all but the last tokens of rows that have many; returns what is left, and where its entries begin."""
        left, places = list(rows), None if places is None else list(places)
        heads: list[ForwardRow] = []
        begins: list[int] = []
        for index, row in enumerate(rows):
            if len(row.tokens) > 1 + self._most:
                cut = len(row.tokens) - (1 if row.upcoming is None else len(row.upcoming))
                heads.append(ForwardRow(row.tokens[:cut], row.start, row.table, first=row.first))
                left[index] = attrs.evolve(row, tokens=row.tokens[cut:], start=row.start + cut)
                if places is not None:
                    begins.append(places[index])
                    places[index] += cut
        if heads:
            self._first(heads, None if places is None else begins)
        return left, places

    def _first(
        self, rows: Sequence[ForwardRow], places: Sequence[int] | None
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """The first step from Python."""
        batch = PagedBatch(rows, self._cache)
        if upcoming := next((row.upcoming for row in rows if row.upcoming is not None), None):
            upcoming.fill(batch.input_ids)
        index = to_device(entries(rows, places), self._cache.device) if self._inputs else None
        return self._begin(batch, batch.input_ids, batch.last, *(part[index] for part in self._inputs))

    def _run(self, rows: Sequence[ForwardRow], counts: Sequence[int], places: Sequence[int] | None) -> torch.Tensor:
        """The same for rows that are sorted by falling counts."""
        rows = [_read(row) for row in rows]
        state, output = self._first(rows, places)
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
