"""The speculator alone: settings, row ids, budgets and what it learns from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from specplug import (
    Budget,
    ConfigurationError,
    Proposal,
    ProposalBatch,
    ProposalRow,
    SamplingParams,
    SpeculativeConfig,
    TokenView,
)
from specplug_suffix import SuffixSettings, SuffixSpeculator, load_speculator

PREFIX = "suffix_decoding_"


def load(tokens: int = 8, **options: Any) -> SuffixSpeculator:
    config = SpeculativeConfig("suffix", tokens, {PREFIX + key: value for key, value in options.items()})
    return load_speculator(config, None)  # type: ignore[arg-type]


def make_row(
    tokens: list[int], row_id: int = 0, new: bool = False, budget: tuple[int, int] = (8, 8), prompt: int = 1
) -> ProposalRow:
    return ProposalRow(
        row_id=row_id,
        is_new=new,
        tokens=TokenView(tokens),
        new_positions=range(len(tokens) - 1),
        budget=Budget(*budget),
        sampling=SamplingParams(),
        num_prompt_tokens=prompt,
    )


def propose(speculator: SuffixSpeculator, *rows: ProposalRow, ended: Sequence[Any] = ()) -> Proposal:
    return speculator.propose(ProposalBatch(rows=list(rows), ended=list(ended)))


def run(speculator: SuffixSpeculator, tokens: list[int], reason: str = "finished", prompt: int = 1) -> None:
    """Shows a request from its first token to its end."""
    committed = tokens[: prompt + 1]
    propose(speculator, make_row(committed, new=True, prompt=prompt))
    committed += tokens[prompt + 1 :]
    propose(speculator, ended=[(0, reason)])


def test_names_are_those_of_vllm_and_so_are_defaults_but_for_the_factor() -> None:
    settings = load().settings
    assert settings == SuffixSettings(24, 10_000, 4.0, 0.1)
    assert load(max_tree_depth=8, max_spec_factor=2).settings.suffix_decoding_max_spec_factor == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tree_depth": 1}, "suffix_decoding_max_tree_depth=1: expected an integer of at least 2"),
        ({"max_tree_depth": 2.5}, "suffix_decoding_max_tree_depth=2.5: expected int"),
        ({"max_cached_requests": -1}, "suffix_decoding_max_cached_requests=-1: expected an integer of at least 0"),
        ({"max_cached_tokens": -1}, "suffix_decoding_max_cached_tokens=-1: expected an integer of at least 0"),
        ({"max_spec_factor": -0.5}, "suffix_decoding_max_spec_factor=-0.5: expected a finite number of at least 0"),
        ({"max_spec_factor": "2"}, "suffix_decoding_max_spec_factor='2': expected float"),
        ({"max_spec_factor": math.inf}, "suffix_decoding_max_spec_factor=inf: expected a finite number"),
        ({"max_spec_offset": math.nan}, "suffix_decoding_max_spec_offset=nan: expected a finite number"),
        ({"min_token_prob": 1.5}, "suffix_decoding_min_token_prob=1.5: expected a probability from 0 to 1"),
        ({"min_token_prob": math.nan}, "suffix_decoding_min_token_prob=nan: expected a probability from 0 to 1"),
        ({"tree_depth": 4}, "unknown key 'suffix_decoding_tree_depth' for method 'suffix'"),
    ],
)
def test_a_bad_setting_is_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_traits_declare_what_is_drafted_at_most() -> None:
    assert (load(5).traits.max_nodes, load(5).traits.max_depth) == (5, 5)
    assert (load(40, max_tree_depth=12).traits.max_nodes, load(40, max_tree_depth=12).traits.max_depth) == (40, 11)
    assert not load().traits.token_only


@pytest.mark.parametrize("budget", [(0, 0), (1, 8), (3, 1), (3, 2), (8, 3), (8, 8)])
def test_the_budget_is_kept(budget: tuple[int, int]) -> None:
    text = [1, 2, 3, 4, 1, 2, 5, 6, 1, 2, 3, 4, 9, 1, 2]
    proposal = propose(load(max_spec_factor=8.0), make_row(text, new=True, budget=budget))
    tokens, scores = proposal.tokens[0], (proposal.scores or [None])[0]
    parents = (proposal.parents or [None])[0] or range(-1, len(tokens) - 1)
    depths: list[int] = []
    for parent in parents:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    assert len(tokens) <= budget[0]
    assert max(depths, default=0) <= budget[1]
    assert bool(tokens) == (budget[0] > 0)
    assert scores is not None
    assert len(scores) == len(tokens)
    assert all(
        score <= 0 and (parent < 0 or score <= scores[parent]) for parent, score in zip(parents, scores, strict=True)
    )


def test_a_row_is_brought_up_to_date_without_a_budget() -> None:
    speculator, text = load(), [1, 2, 3, 4]
    propose(speculator, make_row(text, new=True))
    text += [1, 2]
    assert propose(speculator, make_row(text, budget=(0, 0))).tokens == [[]]
    assert speculator.rows[0].tree.text == text
    assert propose(speculator, make_row(text)).tokens == [[3, 4, 1, 2]]


def test_a_new_row_in_a_slot_starts_anew() -> None:
    speculator = load()
    propose(speculator, make_row([1, 2, 3, 1, 2], new=True))
    assert propose(speculator, make_row([7, 8, 1, 2], new=True)).tokens == [[]]
    propose(speculator, make_row([5, 6, 5], new=True), ended=[(0, "aborted")])
    assert speculator.rows[0].tree.text == [5, 6, 5]


def test_ended_rows_are_forgotten() -> None:
    speculator = load()
    propose(speculator, *(make_row([1, 2, 3, row_id], row_id, new=True) for row_id in range(5)))
    propose(speculator, ended=[(0, "finished"), (1, "aborted"), (2, "preempted"), (9, "finished")])
    assert sorted(speculator.rows) == [3, 4]


def test_outputs_of_finished_requests_alone_are_learnt_complete_and_without_their_prompts() -> None:
    speculator = load()
    run(speculator, [1, 2, 3, 4, 5, 6], "aborted")
    run(speculator, [1, 2, 3, 4, 5, 6], "preempted")
    assert not speculator.finished.texts
    run(speculator, [7, 8, 9, 1, 2, 3], "finished", prompt=3)
    assert list(speculator.finished.texts) == [[1, 2, 3, -1]]
    assert propose(speculator, make_row([0, 1], new=True)).tokens == [[2, 3]]
    assert propose(speculator, make_row([0, 9], new=True)).tokens == [[]]


def test_a_prompt_shown_in_pieces_is_not_learnt() -> None:
    speculator, tokens = load(), [1, 2, 3, 4]
    propose(speculator, make_row(tokens, new=True, budget=(0, 0), prompt=4))
    tokens += [5, 6]
    propose(speculator, ended=[(0, "finished")])
    assert list(speculator.finished.texts) == [[5, 6, -1]]


def test_a_row_that_comes_back_after_a_preemption_is_learnt_from_its_first_output_token() -> None:
    speculator, tokens = load(), [1, 2, 3, 4]
    propose(speculator, make_row(tokens, new=True, prompt=2))
    tokens += [5]
    propose(speculator, make_row(tokens, row_id=3, new=True, prompt=2), ended=[(0, "preempted")])
    tokens += [6]
    propose(speculator, ended=[(3, "finished")])
    assert list(speculator.finished.texts) == [[3, 4, 5, 6, -1]]


def test_the_oldest_outputs_are_evicted() -> None:
    speculator = load(max_cached_requests=3)
    for first in range(10, 100, 10):
        run(speculator, [0, first, first + 1, first + 2])
    assert [text[0] for text in speculator.finished.texts] == [70, 80, 90]
    assert propose(speculator, make_row([0, 60], new=True)).tokens == [[]]
    assert propose(speculator, make_row([0, 70], new=True)).tokens == [[71, 72]]


def test_the_tokens_that_are_kept_are_bounded() -> None:
    speculator = load(max_cached_tokens=7)
    for first in range(10, 100, 10):
        run(speculator, [0, first, first + 1, first + 2])
    assert [text[0] for text in speculator.finished.texts] == [80, 90]
    run(speculator, list(range(9)))
    assert [text[0] for text in speculator.finished.texts] == [80, 90]
    assert sum(1 for _ in speculator.finished.nodes()) <= 2 * 8


def test_no_outputs_are_kept_where_none_may_be() -> None:
    speculator = load(max_cached_requests=0)
    run(speculator, [0, 1, 2, 3])
    assert not speculator.finished.texts
    assert propose(speculator, make_row([0, 1], new=True)).tokens == [[]]
