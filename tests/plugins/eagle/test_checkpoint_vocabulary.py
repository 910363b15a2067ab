"""Draft vocabulary maps: offsets, membership, and what to do when one of them was never filled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specplug.errors import CheckpointError
from specplug_eagle.checkpoint.vocabulary import membership, offsets, read_draft_to_target
from specplug_eagle.head import HeadSpec

pytestmark = pytest.mark.unit

REDUCED = HeadSpec("eagle3", 16, 16, 8, 3, 4, 2, 4, 24)
FULL = HeadSpec("eagle3", 16, 16, 4, 4, 4, 2, 4, 24)
MEMBERS = torch.tensor([1, 4, 7])


def test_offsets_and_membership_are_each_others_inverse() -> None:
    d2t, t2d = offsets(MEMBERS), membership(MEMBERS, 8)
    assert d2t.tolist() == [1, 3, 5]
    assert t2d.tolist() == [False, True, False, False, True, False, False, True]
    for maps in ((d2t, t2d), (d2t, None), (None, t2d), (d2t.int(), t2d.to(torch.uint8))):
        ids, warnings = read_draft_to_target(REDUCED, *maps)
        assert ids is not None
        assert ids.dtype == torch.int64
        assert ids.tolist() == MEMBERS.tolist()
        assert not warnings


def test_maps_of_a_full_vocabulary_change_nothing() -> None:
    zeros, ones = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    for maps in ((None, None), (zeros, ones), (zeros, None)):
        assert read_draft_to_target(FULL, *maps) == (None, ())


def test_a_map_that_was_never_filled_is_rebuilt() -> None:
    ids, (warning,) = read_draft_to_target(REDUCED, torch.zeros(3, dtype=torch.int64), membership(MEMBERS, 8))
    assert ids is not None
    assert ids.tolist() == MEMBERS.tolist()
    assert "rebuilt from t2d" in warning


def test_zeros_may_mean_the_first_tokens() -> None:
    zeros = torch.zeros(3, dtype=torch.int64)
    ids, (warning,) = read_draft_to_target(REDUCED, zeros, None)
    assert ids is not None
    assert ids.tolist() == [0, 1, 2]
    assert "the first 3 tokens" in warning
    ids, warnings = read_draft_to_target(REDUCED, zeros, membership(torch.arange(3), 8))
    assert ids is not None
    assert ids.tolist() == [0, 1, 2]
    assert not warnings


@pytest.mark.parametrize(
    ("d2t", "t2d", "message"),
    [
        ([1, 3, 6], None, "d2t leads to token 8, but the vocabulary has 8"),
        ([-1, 3, 5], None, "d2t leads to token -1"),
        ([5, 3, 1], None, "do not ascend"),
        (MEMBERS.tolist(), None, "d2t leads to token 9"),  # target ids instead of offsets
        ([1, 3, 5], membership(torch.tensor([1, 4, 6]), 8), "contradict each other.*2 are the same"),
        ([1, 3, 5], membership(torch.tensor([1, 4]), 8), "contradict each other: d2t names 3 tokens, t2d 2"),
        ([0, 0, 0], membership(torch.tensor([1, 4]), 8), "t2d names 2 tokens, but the head's output has 3"),
        (None, None, "neither d2t nor t2d"),
    ],
)
def test_maps_that_cannot_be_right(d2t: Any, t2d: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_draft_to_target(REDUCED, None if d2t is None else torch.tensor(d2t), t2d)
