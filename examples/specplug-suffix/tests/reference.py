"""Suffix decoding by counting in plain lists, as slowly and as plainly as it can be said."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence

from specplug_suffix.tree import END

Text = Sequence[int]
Draft = tuple[float, list[int], list[int], list[float]]


def followers(texts: Sequence[Text], pattern: Text) -> Counter[int]:
    """What followed a pattern how often, in order of first appearance."""
    size, found = len(pattern), Counter[int]()
    for text in texts:
        for start in range(len(text) - size):
            if list(text[start : start + size]) == list(pattern):
                found[text[start + size]] += 1
    return found


def grow(texts: Sequence[Text], pattern: Text, most: int, max_depth: int, min_prob: float, depth: int) -> Draft:
    """The draft tree of a pattern: score, tokens, parents, probabilities."""
    tokens: list[int] = []
    parents: list[int] = []
    probs: list[float] = []
    serial = itertools.count()
    heap: list[tuple[float, int, int, tuple[int, ...]]] = []

    def expand(node: int, prob: float, path: tuple[int, ...]) -> None:
        if len(path) == max_depth or len(pattern) + len(path) == depth:
            return
        counts = followers(texts, [*pattern, *path])
        for token, count in counts.items():
            share = prob * (count / counts.total())
            if token != END and share >= min_prob * (1 - 1e-9):
                heapq.heappush(heap, (-share, -next(serial), node, (*path, token)))

    expand(-1, 1.0, ())
    while heap and len(tokens) < most:
        minus, _, parent, path = heapq.heappop(heap)
        tokens.append(path[-1])
        parents.append(parent)
        probs.append(-minus)
        expand(len(tokens) - 1, -minus, path)
    return sum(probs), tokens, parents, probs


def draft(own: Text, outputs: Sequence[Text], nodes: int, max_depth: int, depth: int, factor: float, offset: float,
          min_prob: float) -> tuple[list[int], list[int], list[float]]:  # fmt: skip
    """The best draft tree over all lengths of the match, in the request's own text and in earlier outputs."""
    best: tuple[tuple[float, bool, int, int], Draft] = ((0.0, True, 0, 0), (0.0, [], [], []))
    for is_own, texts in ((True, [own]), (False, [[*output, END] for output in outputs])):
        for length in range(1, min(depth - 1, len(own)) + 1):
            most = max(0, int(min(nodes, factor * length + offset + 1e-6)))
            grown = grow(texts, own[len(own) - length :], most, max_depth, min_prob, depth)
            key = (grown[0], is_own, min(most, max_depth, depth - length), length)
            if grown[0] > 0 and key > best[0]:
                best = (key, grown)
    return best[1][1:]
