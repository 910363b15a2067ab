"""Draft trees against the reference."""

from __future__ import annotations

import random

import pytest
import reference

from specplug_suffix.candidates import Drafter
from specplug_suffix.settings import SuffixSettings
from specplug_suffix.tree import SuffixTree


def make_tree(depth: int, finished: list[list[int]], text: list[int]) -> SuffixTree:
    tree = SuffixTree(depth)
    for output in finished:
        tree.extend(output)
        tree.finish()
    tree.extend(text)
    return tree


class CrowdedTree(SuffixTree):
    """Remembers the frequent children of every edge."""

    crowded = 0


def repetitive(chooser: random.Random, length: int, alphabet: int) -> list[int]:
    text = [chooser.randrange(alphabet)]
    while len(text) < length:
        start = chooser.randrange(len(text))
        text += [*text[start : start + chooser.randrange(1, 12)], chooser.randrange(alphabet)]
    return text[:length]


@pytest.mark.parametrize("seed", range(60))
def test_the_draft_is_the_references(seed: int) -> None:
    chooser = random.Random(seed)
    alphabet = chooser.choice([2, 3, 6, 20])
    settings = SuffixSettings(
        suffix_decoding_max_tree_depth=chooser.choice([2, 5, 12, 24]),
        suffix_decoding_max_spec_factor=chooser.choice([0.5, 1.0, 2.0, 4.0]),
        suffix_decoding_max_spec_offset=chooser.choice([-1.0, 0.0, 0.5, 3.0]),
        suffix_decoding_min_token_prob=chooser.choice([0.0, 0.1, 0.25, 0.5, 1.0]),
    )
    depth = settings.suffix_decoding_max_tree_depth
    drafter = Drafter(settings)
    for _ in range(6):
        own = repetitive(chooser, chooser.randrange(1, 70), alphabet)
        outputs = [repetitive(chooser, chooser.randrange(1, 40), alphabet) for _ in range(chooser.randrange(5))]
        nodes, max_depth = chooser.randrange(9), chooser.randrange(9)
        found = drafter.draft(make_tree(depth, [], own), make_tree(depth, outputs, []), nodes, max_depth)
        expected = reference.draft(
            own,
            outputs,
            nodes,
            max_depth,
            depth,
            settings.suffix_decoding_max_spec_factor,
            settings.suffix_decoding_max_spec_offset,
            settings.suffix_decoding_min_token_prob,
        )
        assert (found.tokens, found.parents, found.probs) == expected
        assert len(found.tokens) <= nodes
        for node, parent in enumerate(found.parents):
            assert -1 <= parent < node
            assert parent == -1 or found.probs[node] <= found.probs[parent]


def test_the_more_frequent_continuation_comes_first_and_the_others_are_drafted_too() -> None:
    drafter = Drafter(SuffixSettings(suffix_decoding_max_spec_factor=8.0))
    local = make_tree(24, [], [1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 3, 8, 1, 2])
    draft = drafter.draft(local, None, 6, 2)
    paths = {(draft.parents[node], token): draft.probs[node] for node, token in enumerate(draft.tokens)}
    assert draft.tokens[0] == 3
    assert paths == {(-1, 3): 2 / 3, (0, 8): 1 / 3, (0, 9): 1 / 3, (-1, 4): 1 / 3, (draft.tokens.index(4), 9): 1 / 3}


def test_earlier_outputs_are_used_where_they_promise_more() -> None:
    drafter = Drafter(SuffixSettings(suffix_decoding_max_spec_factor=1.0))
    shared = make_tree(24, [[5, 1, 2, 3, 4, 5, 6, 7]], [])
    assert drafter.draft(make_tree(24, [], [9, 1, 2, 3]), shared, 8, 8).tokens == [4, 5, 6]
    assert drafter.draft(make_tree(24, [], [1, 2, 3, 0, 0, 0, 1, 2, 3]), shared, 8, 8).tokens == [0, 0, 0]


@pytest.mark.parametrize(("factor", "offset", "expected"), [(1.0, 0.0, 3), (2.0, 0.0, 6), (0.0, 4.0, 4), (0.3, 0.0, 0)])
def test_the_length_of_a_draft_is_that_of_the_match_times_the_factor(
    factor: float, offset: float, expected: int
) -> None:
    settings = SuffixSettings(suffix_decoding_max_spec_factor=factor, suffix_decoding_max_spec_offset=offset)
    draft = Drafter(settings).draft(make_tree(24, [], [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]), None, 24, 24)
    assert draft.tokens == [4, 5, 6, 7, 8, 9][:expected]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_remembered_of_frequent_tokens_changes_no_draft(seed: int) -> None:
    chooser = random.Random(seed)
    drafter = Drafter(SuffixSettings(suffix_decoding_max_spec_factor=4.0, suffix_decoding_max_tree_depth=8))
    own, shared = (SuffixTree(8), SuffixTree(8)), (CrowdedTree(8), CrowdedTree(8))
    for step in range(120):
        new = repetitive(chooser, chooser.randrange(1, 12), chooser.choice([2, 5, 12]))
        for local, finished in (own, shared):
            finished.extend(new)
            finished.finish()
            if len(finished.texts) > 25:
                finished.remove_oldest()
            local.extend(new[:2])
        first, second = (drafter.draft(*trees, 8, 8) for trees in (own, shared))
        assert (first.tokens, first.parents, first.probs) == (second.tokens, second.parents, second.probs), step
