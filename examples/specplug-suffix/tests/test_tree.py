"""The tree against counting in plain lists."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from reference import followers

from specplug_suffix.tree import END, Node, SuffixTree


def random_texts(chooser: random.Random, count: int, longest: int, alphabet: int) -> list[list[int]]:
    return [[chooser.randrange(alphabet) for _ in range(chooser.randrange(1, longest))] for _ in range(count)]


def paths(tree: SuffixTree) -> dict[tuple[int, ...], int]:
    """Every edge by the tokens from the root to its lower end, with its count."""
    found: dict[tuple[int, ...], int] = {}

    def walk(node: Node, prefix: tuple[int, ...]) -> None:
        for token, child in (node.children or {}).items():
            path = (*prefix, *child.text[child.start : child.start + child.length])
            assert path[len(prefix)] == token
            assert len(path) <= tree.depth
            found[path] = child.count
            walk(child, path)

    walk(tree._root, ())
    return found


def check_followers(tree: SuffixTree, texts: list[list[int]]) -> None:
    patterns = {
        tuple(text[start:end])
        for text in texts
        for start in range(len(text))
        for end in range(start + 1, min(start + tree.depth, len(text) + 1))
        if END not in text[start:end]
    }
    for pattern in patterns:
        expected = followers(texts, pattern)
        place = tree.find(list(pattern))
        assert place is not None, pattern
        node, offset = place.node, place.offset
        step = node.text[node.start + offset : node.start + node.length][:1]
        if step:
            assert list(expected) == step
        else:
            shares = {token: share for token, _, share in tree.branches(node, 0.0)}
            counts = {token: child.count for token, child, _ in tree.branches(node, 0.0)}
            assert counts == {token: count for token, count in expected.items() if token != END}
            assert shares == {token: count / expected.total() for token, count in counts.items()}


@pytest.mark.parametrize("seed", range(40))
def test_an_open_text_is_counted_at_every_step(seed: int) -> None:
    chooser = random.Random(seed)
    alphabet, depth = chooser.choice([1, 2, 3, 8]), chooser.choice([2, 3, 5, 9])
    tree, text = SuffixTree(depth), list[int]()
    for _ in range(50):
        new = [chooser.randrange(alphabet) for _ in range(chooser.randrange(1, 4))]
        if chooser.random() < 0.3 and text:
            start = chooser.randrange(len(text))
            new = text[start : start + 9]
        tree.extend(new)
        text += new
        check_followers(tree, [text])
        occurred = [n for n in range(1, min(depth, len(text) + 1)) if followers([text], text[-n:])]
        places = tree.ends()
        assert list(range(1, len(places) + 1)) == occurred
        for length, place in enumerate(places, 1):
            found = tree.find(text[-length:])
            assert found is not None
            assert (found.node, found.offset) == (place.node, place.offset)
    assert sum(1 for _ in tree.nodes()) <= 2 * len(text)


@pytest.mark.parametrize("seed", range(40))
def test_finished_texts_are_counted_together_and_forgotten_one_by_one(seed: int) -> None:
    chooser = random.Random(seed)
    depth = chooser.choice([2, 4, 7, 24])
    texts = random_texts(chooser, 9, 40, chooser.choice([1, 2, 4, 30]))
    texts += [texts[0][:], texts[1][: len(texts[1]) // 2 + 1]]
    tree = SuffixTree(depth)
    for text in texts:
        tree.extend(text)
        tree.finish()
    check_followers(tree, [[*text, END] for text in texts])
    while texts:
        assert tree.remove_oldest() == len(texts.pop(0))
        fresh = SuffixTree(depth)
        for text in texts:
            fresh.extend(text)
            fresh.finish()
        assert paths(tree) == paths(fresh)
        assert {id(node.text) for node in tree.nodes()} <= {id(text) for text in tree.texts}
    assert not list(tree.nodes())


def test_a_text_may_follow_after_others_were_forgotten() -> None:
    tree, texts = SuffixTree(6), random_texts(random.Random(5), 60, 30, 3)
    for first, text in enumerate(texts):
        tree.extend(text)
        tree.finish()
        if first >= 4:
            tree.remove_oldest()
            check_followers(tree, [[*kept, END] for kept in texts[first - 3 : first + 1]])


def test_what_never_occurred_is_not_found() -> None:
    tree = SuffixTree(8)
    tree.extend([1, 2, 3, 4])
    tree.finish()
    tree.extend([5, 6])
    for text in ([1, 3], [4, 5], [7], [1, 2, 3, 4, 5], [3, 4, 1]):
        assert tree.find(text) is None
    assert tree.find([9, 2, 3], 1) is not None


def test_nothing_is_drafted_across_the_end_of_a_text() -> None:
    tree = SuffixTree(8)
    for text in ([1, 2], [1, 2], [3, 1, 2, 4]):
        tree.extend(text)
        tree.finish()
    place = tree.find([1, 2])
    assert place is not None
    assert [(token, share) for token, _, share in tree.branches(place.node, 0.0)] == [(4, 1 / 3)]


def test_a_finished_empty_text_is_none() -> None:
    tree = SuffixTree(4)
    tree.finish()
    assert not tree.texts


def test_a_token_costs_no_more_steps_than_the_depth() -> None:
    tree = SuffixTree(24)
    sizes = []
    for _ in range(300):
        tree.extend([7, 7, 8])
        sizes.append(len(tree.ends()))
    assert max(sizes) == 23
    assert all(left <= right for left, right in pairwise(sizes))
