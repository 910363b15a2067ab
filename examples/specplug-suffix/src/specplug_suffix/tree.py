"""A path-compressed, depth-limited suffix tree with counts, which grows by a token at a time and forgets its oldest text.

It knows nothing about batches, budgets or configuration.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

END = -1
"""Follows the last token of a finished text; never drafted."""


@attrs.define(eq=False)
class Node:
    """An edge of the tree, and the branching at its lower end.

    Attributes:
        text: a text in which the edge's tokens stand; of all finished texts that pass the edge, the newest.
        start: where they start there.
        length: how many they are; the edge of a leaf may be cut short by the end of its text.
        count: how many suffixes entered the edge.
        children: by first token, the edges that go on; None for a leaf.
        frequent: of very many children, those that had at least some count when all were looked at last: that count, the
            tokens appended to the tree by then, and the children.
    """

    text: list[int]
    start: int
    length: int
    count: int = 1
    children: dict[int, Node] | None = None
    frequent: tuple[float, int, list[tuple[int, Node]]] | None = None


@attrs.frozen
class Place:
    """A place in the tree: `offset` tokens down the edge of `node`."""

    node: Node
    offset: int


class SuffixTree:
    """How often every sequence of at most `depth` tokens occurred in some texts, and what followed it.

    A text is appended token by token. `_nodes` and `_offsets` hold the places of those ends of the open text that occurred
    before, the longest first; a token moves each of them one step down, so that its cost is bounded by the depth. An
    end that occurs for the first time becomes a leaf, which needs no care any more: its edge is a slice of the text and
    grows with it. If an end occurred before, so did every shorter one: the places are those of the lengths n to 1.

    Of the texts that are finished, each edge refers to the newest that passes it. The oldest can thus be removed by
    decrementing the counts of its suffixes: what is left refers to texts that are left.

    Attributes:
        depth: the longest sequence that is counted.
        text: the open text.
        texts: the finished texts, oldest first, each with `END` at its end.
    """

    crowded = 64
    """Children of an edge from which on the frequent ones among them are remembered."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.text: list[int] = []
        self.texts: deque[list[int]] = deque()
        self._appended = 0
        self._root = Node([], 0, 0, 0, {})
        self._nodes: list[Node] = []
        self._offsets: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the open text, at a cost of at most `depth` steps each."""
        for token in tokens:
            self._nodes.append(self._root)
            self._offsets.append(0)
            self._advance(token, 0)

    def finish(self) -> None:
        """Closes the open text and begins another."""
        if self.text:
            self._advance(END, 1)
            for node, offset in zip(self._nodes, self._offsets, strict=True):
                node.text, node.start = self.text, len(self.text) - offset
            self.texts.append(self.text)
        self.text, self._nodes, self._offsets = [], [], []

    def _advance(self, token: int, shortest: int) -> None:
        """Moves all places by a token; the last of them is that of the end of `shortest` tokens."""
        text, nodes, offsets = self.text, self._nodes, self._offsets
        text.append(token)
        self._appended += 1
        size, count = len(text), len(nodes)
        first = 0
        while first < count:
            node, offset = nodes[first], offsets[first]
            if offset == node.length:
                children = node.children
                if children is None:
                    children = node.children = {}
                if token in children:
                    break
            elif node.text[node.start + offset] == token:
                break
            else:
                waiting = sum(1 for index in range(first, count) if nodes[index] is node)
                lower = Node(node.text, node.start + offset, node.length - offset, node.count - waiting, node.children)
                children = node.children = {lower.text[lower.start]: lower}
                node.text, node.start, node.length, node.frequent = text, size - 1 - offset, offset, None
            children[token] = Node(text, size - 1, self.depth - (count - 1 - first + shortest))
            first += 1
        del nodes[:first], offsets[:first]
        for index, node in enumerate(nodes):
            offset = offsets[index]
            if offset == node.length:
                node = nodes[index] = node.children[token]  # type: ignore[index]
                node.count += 1
                offset = 0
            offset += 1
            offsets[index] = offset
            if offset == node.length:
                node.text, node.start = text, size - offset
        if len(nodes) - 1 + shortest == self.depth - 1 and nodes:
            del nodes[0], offsets[0]

    def remove_oldest(self) -> int:
        """Forgets the oldest finished text, with all that only it contained. Returns how many tokens that were."""
        text = self.texts.popleft()
        for start in range(len(text) - 1):
            position, end = start, min(start + self.depth, len(text))
            node = self._root
            while position < end:
                children = node.children
                assert children is not None
                child = children[text[position]]
                child.count -= 1
                if not child.count:
                    del children[text[position]]
                    if len(children) == 1 and node is not self._root:
                        _absorb(node, next(iter(children.values())))
                    break
                position += child.length
                node = child
        return len(text) - 1

    def ends(self) -> list[Place]:
        """Returns the places of the ends of the open text that occurred before: of length 1, 2 and so on."""
        return [Place(*pair) for pair in zip(reversed(self._nodes), reversed(self._offsets), strict=True)]

    def find(self, pattern: list[int], start: int = 0) -> Place | None:
        """Returns the place of `pattern[start:]`, or None if it never occurred."""
        node, position, size = self._root, start, len(pattern)
        while position < size:
            child = node.children.get(pattern[position]) if node.children else None
            if child is None:
                return None
            stop = min(position + child.length, size)
            if (
                stop - position > 1
                and child.text[child.start : child.start + stop - position] != pattern[position:stop]
            ):
                return None
            node = child
            if stop == size:
                return Place(node, stop - position)
            position = stop
        return Place(node, 0)

    def branches(self, node: Node, least: float) -> Iterator[tuple[int, Node, float]]:
        """Yields what followed the lower end of an edge: token, edge, share of what followed; shares from `least` on."""
        if node.children:
            total = node.count - self._nodes.count(node)
            fewest = least * total * (1 - 1e-9)
            for token, child in self._frequent(node, fewest):
                if child.count >= fewest and token != END:
                    yield token, child, child.count / total

    def _frequent(self, node: Node, fewest: float) -> Iterable[tuple[int, Node]]:
        """Returns children of an edge, among them all that have at least some count.

        A child gains at most one for each token appended. So none that was left out at the last look can have reached the
        count while that look's threshold and the tokens since then are less than it.
        """
        children = node.children or {}
        if len(children) <= self.crowded:
            return children.items()
        if node.frequent is None or node.frequent[0] + self._appended - node.frequent[1] >= fewest:
            threshold = fewest / 2
            kept = [(token, child) for token, child in children.items() if child.count >= threshold]
            node.frequent = (threshold, self._appended, kept)
        return node.frequent[2]

    def nodes(self) -> Iterator[Node]:
        """Yields all edges of the tree."""
        stack = [self._root]
        while stack:
            node = stack.pop()
            if node is not self._root:
                yield node
            stack.extend((node.children or {}).values())


def _absorb(node: Node, child: Node) -> None:
    """Joins an edge and the only one that is left below it."""
    node.text, node.start = child.text, child.start - node.length
    node.length += child.length
    node.children, node.frequent = child.children, None
