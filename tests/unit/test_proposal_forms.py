"""A proposal may be made of lists, numpy arrays or tensors; values that are not integers are refused, and never rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from specplug import Budget, DraftDistributions, Proposal, Verdict
from specplug.errors import PluginError
from specplug.speculation.draft import Draft
from specplug.speculation.validation import check_proposal
from specplug.speculation.verification.verdict import check_verdict

VOCABULARY = 16


def check(proposal: Proposal, rows: int = 1) -> list[Draft | None]:
    return check_proposal(proposal, [Budget(4, 4)] * rows, "mine", VOCABULARY)


def drafted(proposal: Proposal, rows: int = 1) -> list[list[int]]:
    drafts = [draft.tokens if draft else [] for draft in check(proposal, rows)]
    assert all(type(token) is int for row in drafts for token in row)
    return drafts


@pytest.mark.parametrize(
    "tokens",
    [
        [[3, 4]],
        [np.array([3, 4])],
        [[np.int64(3), np.uint8(4)]],
        [(3, torch.tensor(4))],
        [torch.tensor([3, 4], dtype=torch.int32)],
        np.array([[3, 4]], dtype=np.int16),
        torch.tensor([[3, 4]]),
        torch.tensor([[3, 4]], dtype=torch.uint8),
    ],
)
def test_ids_of_other_libraries_are_taken(tokens: Any) -> None:
    assert drafted(Proposal(tokens)) == [[3, 4]]


@pytest.mark.parametrize(
    "tokens",
    [
        [[True]],
        [[1.0]],
        [[np.float64(1)]],
        [[np.bool_(True)]],
        [[torch.tensor(1.0)]],
        [[torch.tensor(True)]],
        [["1"]],
        [[None]],
        [[[1]]],
        [np.array([1.0])],
        [torch.tensor([[1]])],
        [torch.tensor([True])],
        [[np.int64(VOCABULARY)]],
        [[np.int8(-1)]],
        torch.tensor([[True]]),
        np.array([[1.0]]),
        torch.tensor([1]),
        torch.tensor(1),
        [torch.tensor(1)],
        [torch.tensor(0)],
        [5],
        5,
        None,
    ],
)
def test_what_is_no_id_is_refused_in_every_form(tokens: Any) -> None:
    with pytest.raises(PluginError, match=r"not an id of|expected integers \[rows, K\]|expected a list of ids"):
        check(Proposal(tokens))


@pytest.mark.parametrize(
    "tokens",
    [
        torch.tensor([]),
        torch.tensor([], dtype=torch.int64),
        torch.empty(0, 3),
        torch.zeros(0, 3, dtype=torch.int64),
        np.array([]),
        np.empty((0, 4), dtype=np.int64),
        [],
        (),
    ],
)
@pytest.mark.parametrize("lengths", [None, [], torch.tensor([]), torch.tensor([], dtype=torch.int64), np.array([])])
def test_the_tensor_form_of_a_batch_without_rows_is_no_fault(tokens: Any, lengths: Any) -> None:
    assert check(Proposal(tokens, lengths=lengths), rows=0) == []


@pytest.mark.parametrize("tokens", [torch.zeros(2, 0, dtype=torch.int64), torch.tensor([[], []]), np.empty((2, 0))])
def test_rows_without_tokens_are_empty_drafts(tokens: Any) -> None:
    assert check(Proposal(tokens), rows=2) == [None, None]


@pytest.mark.parametrize("lengths", [[1, 2], (1, 2), torch.tensor([1, 2]), np.array([1, 2])])
@pytest.mark.parametrize("tokens", [[[3, 0], [4, 5]], torch.tensor([[3, 0], [4, 5]]), np.array([[3, 0], [4, 5]])])
def test_lengths_hold_for_every_form_of_tokens(tokens: Any, lengths: Any) -> None:
    assert drafted(Proposal(tokens, lengths=lengths), 2) == [[3], [4, 5]]


def test_lengths_hold_for_parents_and_scores_too() -> None:
    tokens, parents, scores = torch.tensor([[3, 4, 0]]), torch.tensor([[-1, -1, -1]]), torch.tensor([[-1.0, -2.0, 9.0]])
    (draft,) = check(Proposal(tokens, parents=parents, scores=scores, lengths=[2]))
    assert draft is not None
    assert (draft.tokens, draft.parents, draft.scores) == ([3, 4], [-1, -1], [-1.0, -2.0])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([-1], "row 0: proposal.lengths is -1, and proposal.tokens has 2"),
        ([3], "row 0: proposal.lengths is 3"),
        ([1, 1], "proposal.lengths has 2 entries for 1 rows"),
        ([1.5], "proposal.lengths: 1.5 is not an integer"),
        (2, "proposal.lengths=2: expected a list of integers"),
        (torch.tensor(2), "proposal.lengths=tensor"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths: Any, message: str) -> None:
    for tokens in ([[3, 4]], torch.tensor([[3, 4]])):
        with pytest.raises(PluginError, match=message):
            check(Proposal(tokens, lengths=lengths))


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda values: torch.tensor(values, dtype=torch.int32)])
def test_parents_may_be_arrays_or_tensors(form: Any) -> None:
    (draft,) = check(Proposal([[3, 4, 5]], parents=[form([-1, 0, -1])]))
    assert draft is not None
    assert draft.parents == [-1, 0, -1]
    assert {type(parent) for parent in draft.parents} == {int}


@pytest.mark.parametrize(
    "parents", [[-1, 0.7], [-1, False], np.array([-1.0, 0.0]), torch.tensor([-1.0, 0.0]), ["-1", 0]]
)
def test_a_parent_that_is_no_integer_is_refused_and_not_rounded(parents: Any) -> None:
    with pytest.raises(PluginError, match=r"row 0: parents: .* is not an integer"):
        check(Proposal([[3, 4]], parents=[parents]))


@pytest.mark.parametrize(
    "form", [list, np.array, torch.tensor, lambda values: torch.tensor(values, dtype=torch.float16)]
)
def test_scores_may_be_arrays_or_tensors(form: Any) -> None:
    (draft,) = check(Proposal([[3, 4]], scores=[form([-0.5, -1.5])]))
    assert draft is not None
    assert draft.scores == [-0.5, -1.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": [3]}, "row 0: scores=3: expected a number for each node"),
        ({"scores": [[None, 1]]}, "row 0: scores="),
        ({"scores": [np.array([0.0, np.nan])]}, "node 1 has the score nan"),
        ({"parents": 3}, "proposal.parents=3: expected an entry for each row"),
        ({"parents": [3]}, "row 0: parents=3: expected a list of integers"),
        ({"probs": [torch.ones(2, VOCABULARY)]}, "row 0: probs are Tensor, expected DraftDistributions"),
    ],
)
def test_what_is_no_list_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        check(Proposal([[3, 4]], **options))


def test_distributions_may_be_arrays_and_their_index_too() -> None:
    values = np.full((1, 4), 0.25, dtype=np.float32)
    for index in ([0, 0], np.array([0, 0]), torch.tensor([0, 0])):
        for ids in (np.array([3, 4, 5, 6], dtype=np.int32), torch.tensor([3, 4, 5, 6], dtype=torch.int32)):
            probs = DraftDistributions(values, index, ids)  # type: ignore[arg-type]
            (draft,) = check(Proposal([[3, 4]], parents=[[-1, -1]], probs=[probs]))
            assert draft is not None
            assert draft.probs is not None
            assert draft.probs.token_ids is not None
            assert (draft.probs.index, draft.probs.token_ids.dtype) == ([0, 0], torch.int64)
            assert draft.keep([1]).probs.index == [0]  # type: ignore[union-attr]
            assert torch.equal(draft.probs.values, torch.full((1, 4), 0.25))


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (DraftDistributions(torch.full((1, 2), 0.5), token_ids=torch.tensor([3, VOCABULARY])), "go from 3 to 16"),
        (DraftDistributions(torch.full((1, 2), 0.5), token_ids=torch.tensor([3, -1])), "go from -1 to 3"),
        (DraftDistributions(torch.full((1, 2), 0.5), token_ids=torch.tensor([3.0, 4.0])), "must be an integer tensor"),
        (DraftDistributions(torch.full((1, 2), 0.5), token_ids=[3, 4]), "must be an integer tensor"),  # type: ignore[arg-type]
        (DraftDistributions(torch.full((1, VOCABULARY), 1 / VOCABULARY), index=[0.5]), "0.5 is not an integer"),  # type: ignore[list-item]
        (DraftDistributions(torch.ones(1, VOCABULARY, dtype=torch.int64)), "must be a floating tensor"),
    ],
)
def test_distributions_that_cannot_be_are_refused(probs: DraftDistributions, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        check(Proposal([[3]], probs=[probs]))


def test_a_verdict_of_other_libraries_integers_becomes_one_of_ints() -> None:
    proposal = Proposal([[3, 4], []])
    verdict = Verdict([np.array([0, 1]), torch.tensor([], dtype=torch.int64)], torch.tensor([5, 6]))  # type: ignore[arg-type]
    checked = check_verdict(verdict, proposal, VOCABULARY)
    assert (checked.accepted, checked.next_tokens) == ([[0, 1], []], [5, 6])
    assert {type(each) for each in (*checked.accepted[0], *checked.next_tokens)} == {int}


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict([[0]], [5.0]),  # type: ignore[list-item]
        Verdict([[0]], [True]),
        Verdict([[0]], [float("nan")]),  # type: ignore[list-item]
        Verdict([[0]], [None]),  # type: ignore[list-item]
        Verdict([[0.0]], [5]),  # type: ignore[list-item]
        Verdict([[False]], [5]),
        Verdict([[1]], [5]),
        Verdict([[-1]], [5]),
    ],
)
def test_a_verdict_without_integers_is_refused(verdict: Verdict) -> None:
    with pytest.raises(PluginError, match=r"is not in the vocabulary|is not a path from the root"):
        check_verdict(verdict, Proposal([[3, 4]]), VOCABULARY)
