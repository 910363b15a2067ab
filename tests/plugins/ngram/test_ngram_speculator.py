"""The speculator alone: configuration, row ids and budgets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from specplug import (
    Budget,
    ConfigurationError,
    ProposalBatch,
    ProposalRow,
    SamplingParams,
    SpeculativeConfig,
    TokenView,
)
from specplug_ngram import NgramSpeculator, load_speculator

pytestmark = pytest.mark.unit


def make_row(
    tokens: Any, row_id: int = 0, is_new: bool = False, nodes: int = 4, depth: int | None = None
) -> ProposalRow:
    return ProposalRow(
        row_id=row_id,
        is_new=is_new,
        tokens=TokenView(tokens) if isinstance(tokens, list) else tokens,
        new_positions=range(0),
        new_states=slice(0, 0),
        budget=Budget(nodes, nodes if depth is None else depth),
        sampling=SamplingParams(),
        outcome=None,
        table=None,  # type: ignore[arg-type]
        forked_from=None,
        generator=torch.Generator,
    )


def propose(speculator: NgramSpeculator, *rows: ProposalRow, ended: Sequence[Any] = ()) -> list[list[int]]:
    proposal = speculator.propose(ProposalBatch(rows=list(rows), ended=list(ended)))
    assert proposal.parents is None
    assert proposal.probs is None
    return [list(tokens) for tokens in proposal.tokens]


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({}, (5, 5)),
        ({"prompt_lookup_max": 4}, (4, 4)),
        ({"prompt_lookup_min": 2}, (2, 2)),
        ({"prompt_lookup_max": 4, "prompt_lookup_min": None}, (4, 4)),
        ({"prompt_lookup_max": 4, "prompt_lookup_min": 1}, (1, 4)),
    ],
)
def test_a_missing_length_is_taken_from_the_other(options: dict[str, Any], lengths: tuple[int, int]) -> None:
    speculator = load_speculator(SpeculativeConfig("ngram", 5, options), None)  # type: ignore[arg-type]
    assert (speculator.shortest, speculator.longest) == lengths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_min": 0}, "prompt_lookup_min=0: expected an integer of at least 1"),
        ({"prompt_lookup_max": -1}, "prompt_lookup_max=-1: expected an integer of at least 1"),
        ({"prompt_lookup_max": 3, "prompt_lookup_min": 0}, "prompt_lookup_min=0"),
        ({"prompt_lookup_max": 2, "prompt_lookup_min": 3}, "prompt_lookup_min=3 is more than prompt_lookup_max=2"),
        ({"prompt_lookup_max": "4"}, "prompt_lookup_max"),
        ({"prompt_lookup_max": True}, "prompt_lookup_max"),
        ({"prompt_lookup_max": 2.5}, "prompt_lookup_max"),
        ({"prompt_lookup_mx": 4}, "did you mean 'prompt_lookup_max'"),
        ({"model": "draft"}, "unknown key 'model'"),
    ],
)
def test_lengths_that_cannot_work_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load_speculator(SpeculativeConfig("ngram", 5, options), None)  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_drafts_what_followed_the_most_recent_of_the_longest_matches() -> None:
    speculator = NgramSpeculator(shortest=1, longest=3)
    tokens = [1, 2, 3, 40, 1, 2, 3, 50, 51, 52, 53, 54, 3, 60, 1, 2, 3]
    assert propose(speculator, make_row(tokens, is_new=True)) == [[50, 51, 52, 53]]


def test_nothing_is_drafted_below_the_shortest_length() -> None:
    speculator = NgramSpeculator(shortest=3, longest=5)
    assert propose(speculator, make_row([1, 2, 3, 4, 9, 2, 3], is_new=True)) == [[]]


@pytest.mark.parametrize(
    ("nodes", "depth", "count"), [(0, 0, 0), (1, 1, 1), (6, 6, 6), (6, 2, 2), (2, 6, 2), (30, 30, 30)]
)
def test_the_budget_is_honoured_and_used(nodes: int, depth: int, count: int) -> None:
    speculator = NgramSpeculator(shortest=1, longest=4)
    (draft,) = propose(speculator, make_row([5, 6, 7, 5, 6, 7, 5], is_new=True, nodes=nodes, depth=depth))
    assert draft == ([6, 7, 5] * 10)[:count]


def test_a_row_without_budget_is_kept_up_to_date() -> None:
    speculator = NgramSpeculator(shortest=2, longest=2)
    tokens = [1, 2, 3, 4]
    assert propose(speculator, make_row(tokens, is_new=True, nodes=0)) == [[]]
    tokens += [9, 1, 2]
    assert propose(speculator, make_row(tokens, nodes=0)) == [[]]
    assert propose(speculator, make_row(tokens)) == [[3, 4, 9, 1]]


def test_rows_do_not_see_each_other() -> None:
    speculator = NgramSpeculator(shortest=2, longest=2)
    rows = (make_row([1, 2, 3, 9], row_id=0, is_new=True), make_row([8, 8, 1, 2], row_id=1, is_new=True))
    assert propose(speculator, *rows) == [[], []]


@pytest.mark.parametrize("is_new", [True, False], ids=["announced", "unannounced"])
@pytest.mark.parametrize(
    "reused", [[8, 8, 8, 8, 8, 1, 2], [1, 2], [3, 3, 3, 1, 2]], ids=["longer", "shorter", "as long"]
)
def test_a_slot_that_holds_another_row_is_read_anew(reused: list[int], is_new: bool) -> None:
    speculator = NgramSpeculator(shortest=2, longest=2)
    assert propose(speculator, make_row([1, 2, 5, 1, 2], is_new=True)) == [[5, 1, 2, 5]]
    assert propose(speculator, make_row(reused, is_new=is_new)) == [[]]


def test_a_new_row_forgets_even_what_looks_the_same() -> None:
    speculator = NgramSpeculator(shortest=1, longest=1)
    tail = list(range(100, 150))
    propose(speculator, make_row([1, 2, *tail], is_new=True))
    assert propose(speculator, make_row([3, 4, *tail, 1], is_new=True)) == [[]]


@pytest.mark.parametrize("reason", ["finished", "aborted", "preempted"])
def test_ended_rows_are_forgotten_before_their_slots_are_reused(reason: str) -> None:
    speculator = NgramSpeculator(shortest=1, longest=2)
    propose(speculator, make_row([1, 2, 1], row_id=0, is_new=True), make_row([1, 2, 1], row_id=1, is_new=True))
    drafts = propose(
        speculator, make_row([4, 5, 4], row_id=0, is_new=True), ended=[(0, reason), (1, reason), (7, reason)]
    )
    assert drafts == [[5, 4, 5, 4]]
    assert set(speculator._indexes) == {0}


def test_any_history_of_a_row_gives_the_same_drafts() -> None:
    choose = random.Random(1)
    speculator = NgramSpeculator(shortest=1, longest=3)
    tokens = [choose.randrange(4) for _ in range(10)]
    for step in range(100):
        fresh = NgramSpeculator(shortest=1, longest=3)
        assert propose(speculator, make_row(tokens, is_new=step == 0)) == propose(fresh, make_row(tokens, is_new=True))
        tokens += [choose.randrange(4) for _ in range(choose.randint(0, 5))]
        del tokens[len(tokens) - choose.choice([0, 0, 0, 2]) :]


class _ShortReads(Sequence[int]):
    """Tokens of which only a few may be read at a time."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: Any) -> Any:
        found = self._tokens[index]
        assert isinstance(found, int) or len(found) < 100, "the step read the row as a whole"
        return found


def test_a_step_reads_only_what_is_new() -> None:
    choose = random.Random(2)
    speculator = NgramSpeculator(shortest=1, longest=5)
    tokens = [choose.randrange(50) for _ in range(5000)]
    propose(speculator, make_row(tokens, is_new=True))
    for _ in range(10):
        tokens += [choose.randrange(50) for _ in range(6)]
        assert propose(speculator, make_row(_ShortReads(tokens)))[0]
