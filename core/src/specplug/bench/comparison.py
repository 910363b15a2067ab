"""All contestants under all settings, interleaved, so that a slow moment of the machine hits every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import attrs

from specplug.bench.contestant import Contestant, OnStep, why_missing
from specplug.bench.measurement import Measurement
from specplug.bench.workload import Cell, Workload

OnRun = Callable[[Contestant, Cell, int], None]


@attrs.frozen(eq=False)
class Comparison:
    """What was measured.

    Attributes:
        workload: what was generated.
        cells: the settings.
        contestants: the rows, plain decoding first.
        repetitions: how often each was measured.
        runs: by setting and label the repetitions, in order; empty where a contestant has nothing to show.
    """

    workload: Workload
    cells: Sequence[Cell]
    contestants: Sequence[Contestant]
    repetitions: int
    runs: dict[tuple[Cell, str], list[Measurement]]


@attrs.frozen(eq=False)
class Watcher:
    """Who is told how far it is.

    Attributes:
        on_open: before a contestant gets ready; gives what is told of its startup steps.
        on_run: before a run, with its repetition; 0 is the warm-up.
        advance: of tokens as they are generated, those of warm-ups too.
    """

    on_open: Callable[[Contestant], OnStep] = lambda contestant: lambda report: None
    on_run: OnRun = lambda contestant, cell, repetition: None
    advance: Callable[[int], None] = lambda tokens: None


def compare(
    contestants: Sequence[Contestant],
    cells: Sequence[Cell],
    workload: Workload,
    repetitions: int,
    watcher: Watcher,
    *,
    one_at_a_time: bool = False,
) -> Comparison:
    """Measures; every contestant runs a setting once unmeasured before it counts.

    A contestant that learns must not have seen what counts: it is opened anew for every counted run, and runs random
    tokens first.

    Args:
        contestants: the rows, plain decoding first.
        cells: the settings.
        workload: what to generate.
        repetitions: how often each is measured.
        watcher: told how far it is.
        one_at_a_time: only one contestant is open at any moment, and opened anew in every repetition.
    """
    if not one_at_a_time:
        with ExitStack() as stack:
            for contestant in contestants:
                open_contestant(contestant, stack, watcher)
            return compare_open(contestants, cells, workload, repetitions, watcher)
    result = _empty(contestants, cells, workload, repetitions)
    for repetition in range(1, repetitions + 1):
        for contestant in _rotated(contestants, repetition):
            with ExitStack() as stack:
                open_contestant(contestant, stack, watcher)
                for cell in cells:
                    _run(result, contestant, cell, 0, watcher)
                    _run(result, contestant, cell, repetition, watcher)
    return result


def compare_open(
    contestants: Sequence[Contestant],
    cells: Sequence[Cell],
    workload: Workload,
    repetitions: int,
    watcher: Watcher,
) -> Comparison:
    """As `compare`, of contestants that are open."""
    result = _empty(contestants, cells, workload, repetitions)
    for cell in cells:
        for repetition in range(repetitions + 1):
            for contestant in _rotated(contestants, repetition):
                _run(result, contestant, cell, repetition, watcher)
    return result


def open_contestant(contestant: Contestant, stack: ExitStack, watcher: Watcher) -> None:
    """Gets a contestant ready; the stack closes it."""
    stack.callback(contestant.close)
    contestant.open(watcher.on_open(contestant))


def tokens_to_generate(
    contestants: Sequence[Contestant],
    cells: Sequence[Cell],
    workload: Workload,
    repetitions: int,
    *,
    one_at_a_time: bool,
) -> int:
    """How many tokens `compare` will generate, warm-ups included. Which contestants learn is known once they were open."""
    able = [(c, cell) for c in contestants for cell in cells if why_missing(c, workload, cell) is None]
    return sum(
        workload.num_tokens(cell.batch) * (2 * repetitions if one_at_a_time or c.learns else repetitions + 1)
        for c, cell in able
    )


def _empty(
    contestants: Sequence[Contestant], cells: Sequence[Cell], workload: Workload, repetitions: int
) -> Comparison:
    runs: dict[tuple[Cell, str], list[Measurement]] = {(cell, c.label): [] for cell in cells for c in contestants}
    return Comparison(workload, cells, contestants, repetitions, runs)


def _run(result: Comparison, contestant: Contestant, cell: Cell, repetition: int, watcher: Watcher) -> None:
    """One run; repetition 0 only warms up."""
    if why_missing(contestant, result.workload, cell) is not None or (contestant.learns and not repetition):
        return
    if contestant.is_taught:
        contestant.close()
        contestant.open(watcher.on_open(contestant))
    watcher.on_run(contestant, cell, repetition)
    if contestant.learns:
        contestant.run(result.workload.unrelated(), cell, watcher.advance)
    measured = contestant.run(result.workload, cell, watcher.advance)
    if repetition:
        result.runs[cell, contestant.label].append(measured)


def _rotated(contestants: Sequence[Contestant], by: int) -> Iterator[Contestant]:
    """Another one is first in every repetition."""
    start = by % len(contestants)
    yield from contestants[start:]
    yield from contestants[:start]
