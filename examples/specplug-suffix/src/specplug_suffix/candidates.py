"""Draft trees from a suffix tree, and the selection of one of them."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from specplug_suffix.settings import SuffixSettings
    from specplug_suffix.tree import Place, SuffixTree


@attrs.define(eq=False)
class Candidate:
    """A draft tree with the estimated probability of each node's path.

    Attributes:
        score: the expected number of accepted tokens: the sum of the probabilities.
        tokens: the nodes' tokens, parents before children.
        parents: the index of each node's parent, -1 for the root.
        probs: the nodes' probabilities, non-increasing.
    """

    score: float = 0.0
    tokens: list[int] = attrs.field(factory=list)
    parents: list[int] = attrs.field(factory=list)
    probs: list[float] = attrs.field(factory=list)


def grow(tree: SuffixTree, place: Place, max_nodes: int, max_depth: int, min_prob: float) -> Candidate:
    """Grows the draft tree of the most probable continuations of a place, greedily.

    Of equally probable nodes, the one whose parent was added last comes first; of siblings, the last one.
    """
    candidate = Candidate()
    tokens, parents, probs = candidate.tokens, candidate.parents, candidate.probs
    serial = 0
    heap = [(-1.0, 0, place.node, place.offset, -1, 0)]
    while heap and len(tokens) < max_nodes:
        minus_prob, _, node, offset, parent, depth = heapq.heappop(heap)
        start = node.start + offset
        room = min(max_nodes - len(tokens), max_depth - depth)
        run = node.text[start : min(start + room, node.start + node.length)]
        if run and run[-1] < 0:
            run.pop()
        if run:
            first = len(tokens)
            tokens += run
            parents.append(parent)
            parents += range(first, first + len(run) - 1)
            probs += [-minus_prob] * len(run)
            parent, depth = len(tokens) - 1, depth + len(run)
        if offset + len(run) == node.length and depth < max_depth and len(tokens) < max_nodes:
            for _, child, share in tree.branches(node, min_prob / -minus_prob):
                serial -= 1
                heapq.heappush(heap, (minus_prob * share, serial, child, 0, parent, depth))
    candidate.score = sum(probs)
    return candidate


@attrs.define(eq=False)
class Drafter:
    """Chooses the draft tree with the best score, over all match lengths, in the request's tree and the global one.

    A match of m tokens allows `max_spec_factor` × m + `max_spec_offset` draft tokens, and match and draft together have at
    most `max_tree_depth` tokens. Both bound the score. Match lengths are tried by descending bound, until the bound does not
    exceed the best score.
    """

    settings: SuffixSettings
    _bounds: dict[tuple[int, int], list[tuple[int, int]]] = attrs.field(factory=dict, init=False, repr=False)

    def draft(self, local: SuffixTree, shared: SuffixTree | None, max_nodes: int, max_depth: int) -> Candidate:
        """Returns the best draft tree after the open text of `local`; an empty one without a match."""
        best = Candidate()
        if max_nodes < 1 or max_depth < 1:
            return best
        bounds = self._bounds.get((max_nodes, max_depth))
        if bounds is None:
            bounds = self._bounds[max_nodes, max_depth] = self._bounds_for(max_nodes, max_depth)
        least = self.settings.suffix_decoding_min_token_prob
        places = local.ends()
        for bound, length in bounds:
            if bound <= best.score:
                break
            if length <= len(places):
                candidate = grow(local, places[length - 1], self._most(length, max_nodes), max_depth, least)
                if candidate.score > best.score:
                    best = candidate
        if shared is None or not shared.texts:
            return best
        pattern = local.text[1 - local.depth :]
        unmatched = len(pattern) + 1
        for bound, length in bounds:
            if bound <= best.score:
                break
            if length < unmatched:
                place = shared.find(pattern, len(pattern) - length)
                if place is None:
                    unmatched = length
                    continue
                candidate = grow(shared, place, self._most(length, max_nodes), max_depth, least)
                if candidate.score > best.score:
                    best = candidate
        return best

    def _most(self, length: int, max_nodes: int) -> int:
        settings = self.settings
        wanted = settings.suffix_decoding_max_spec_factor * length + settings.suffix_decoding_max_spec_offset
        return max(0, int(min(max_nodes, wanted + 1e-6)))

    def _bounds_for(self, max_nodes: int, max_depth: int) -> list[tuple[int, int]]:
        """(upper bound of the score, match length) for all match lengths that allow a draft, highest bound first."""
        depth = self.settings.suffix_decoding_max_tree_depth
        bounds = [(min(self._most(n, max_nodes), max_depth, depth - n), n) for n in range(1, depth)]
        return sorted((pair for pair in bounds if pair[0] > 0), reverse=True)
