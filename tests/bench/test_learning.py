"""A method that learns is measured on what it has not seen."""

from __future__ import annotations

from typing import Any

import pytest

from specplug import Proposal, SpeculatorTraits, hookimpl
from specplug.bench.comparison import Comparison, Watcher, compare
from specplug.bench.contestants import PLAIN, EngineContestant
from specplug.bench.summary import summarize
from specplug.bench.workload import BenchPrompt, Cell, Workload

OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "memory": "256MiB", "max_num_seqs": 2}
CONFIG = {"method": "memoriser", "num_speculative_tokens": 4}
WORKLOAD = Workload("test", [BenchPrompt("a", [5, 6, 7, 8, 9]), BenchPrompt("b", [50, 60, 70, 80])], max_tokens=16)


class Memoriser:
    """Knows by heart how every prompt went on, and drafts nothing else."""

    traits = SpeculatorTraits(learns=True)

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], list[int]] = {}

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        return Proposal([self.draft(row) for row in batch.rows])

    def draft(self, row: Any) -> list[int]:
        tokens = row.tokens[:]
        known = self.known.setdefault(tuple(tokens[: row.num_prompt_tokens]), [])
        if len(tokens) > len(known):
            known[:] = tokens
        return known[len(tokens) : len(tokens) + row.budget.max_nodes]


def measure(cells: list[Cell], *, one_at_a_time: bool) -> Comparison:
    plugins = {"memoriser": lambda config, target: Memoriser()}
    learner = EngineContestant("memoriser", "tiny", CONFIG, {**OPTIONS, "plugins": plugins})
    plain = EngineContestant(PLAIN, "tiny", None, OPTIONS)
    return compare([plain, learner], cells, WORKLOAD, 2, Watcher(), one_at_a_time=one_at_a_time)


@pytest.mark.slow
@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_a_memoriser_gains_nothing(one_at_a_time: bool) -> None:
    cells = [Cell(1, 0.0)] if one_at_a_time else [Cell(1, 0.0), Cell(1, 0.5)]
    comparison = measure(cells, one_at_a_time=one_at_a_time)
    for cell in cells:
        runs = comparison.runs[cell, "memoriser"]
        assert len(runs) == 2
        for run in runs:
            assert run.stats is not None
            assert run.stats.num_accepted_draft_tokens == 0
            assert run.stats.num_steps == run.tokens == WORKLOAD.num_tokens(1)
    assert [summary.learns for summary in summarize(comparison)] == [False, True] * len(cells)


def test_a_memoriser_shows_nothing_where_prompts_repeat_within_a_run() -> None:
    (_, learner) = summarize(measure([Cell(2, 0.0)], one_at_a_time=False))
    assert learner.missing == "it learns: needs 4 different prompts, got 2"
