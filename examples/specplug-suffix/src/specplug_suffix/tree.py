"""A path-compressed, depth-limited suffix tree with counts. It grows token by token and can remove its oldest text."""

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
    """An edge of the tree, and its children.

    Attributes:
        text: a text that contains the edge's tokens: the newest finished text that passes the edge.
        start: their start in the text.
        length: their number; the text may end before the edge of a leaf does.
        count: how many suffixes entered the edge.
        children: the edges below, by first token; None for a leaf.
        frequent: a cache for edges with very many children: a count, the number of tokens in the tree when it was made, and
            the children that had at least that count.
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
    """Counts all sequences of at most `depth` tokens in some texts, and what followed them.

    A text is appended token by token. `_nodes` and `_offsets` are the places of those suffixes of the open text that occurred
    before, the longest first. A token moves each of them one step down, so its cost is bounded by the depth. A suffix that
    occurs for the first time becomes a leaf; its edge is a slice of the text and grows with it. If a suffix occurred before,
    so did every shorter one: the places are those of the lengths n to 1.

    Each edge refers to the newest finished text that passes it. So the oldest text can be removed by decrementing the counts
    of its suffixes: the remaining edges refer to remaining texts.

    Attributes:
        depth: the longest sequence that is counted.
        text: the open text.
        texts: the finished texts, oldest first, each with `END` at its end.
    """

    crowded = 64
    """The frequent children of an edge are cached if it has more children than this."""

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
        """Closes the open text and begins a new one."""
        if self.text:
            self._advance(END, 1)
            for node, offset in zip(self._nodes, self._offsets, strict=True):
                node.text, node.start = self.text, len(self.text) - offset
            self.texts.append(self.text)
        self.text, self._nodes, self._offsets = [], [], []

    def _advance(self, token: int, shortest: int) -> None:
        """Moves all places by a token; the last is that of the suffix of `shortest` tokens."""
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
        """Removes the oldest finished text, with everything that only it contained. Returns its number of tokens."""
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
        """Returns the places of the suffixes of the open text that occurred before, of length 1, 2, …"""
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
        """Yields (token, edge, share) for what followed an edge with a share of at least `least`."""
        if node.children:
            total = node.count - self._nodes.count(node)
            fewest = least * total * (1 - 1e-9)
            for token, child in self._frequent(node, fewest):
                if child.count >= fewest and token != END:
                    yield token, child, child.count / total

    def _frequent(self, node: Node, fewest: float) -> Iterable[tuple[int, Node]]:
        """Returns children of an edge, among them all with a count of at least `fewest`.

        A count grows by at most one per appended token. So the cache is complete while its threshold and the number of tokens
        since then are together less than `fewest`.
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
    """Merges an edge with its only child."""
    node.text, node.start = child.text, child.start - node.length
    node.length += child.length
    node.children, node.frequent = child.children, None
