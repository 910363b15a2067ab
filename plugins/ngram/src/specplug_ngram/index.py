"""Finds earlier occurrences of the end of a growing token sequence, at a cost that does not grow with its length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence


@attrs.define(eq=False)
class NgramIndex:
    """The last end of every n-gram of a sequence, updated as tokens are appended.

    The key of an n-gram of the shortest length is the hash of its tokens; that of a longer one is the hash of its first
    token and the key of the rest. So each further length costs one hash of two values, and one dict serves all lengths. A
    longer n-gram is stored only if its rest occurred before: until then the rest has the same end. That keeps the index
    small on text without repetitions. A match is compared token by token before it is returned, so a hash collision can hide
    a match but not produce a wrong one.

    Attributes:
        shortest: the fewest tokens of a match.
        longest: the most tokens of a match.
        tokens: the sequence so far.
    """

    shortest: int
    longest: int
    tokens: list[int] = attrs.field(factory=list, init=False)
    _indexed: int = attrs.field(default=0, init=False)
    _last_end: dict[int, int] = attrs.field(factory=dict, init=False, repr=False)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens. The cost depends on the number of new tokens only."""
        sequence = self.tokens
        sequence.extend(tokens)
        shortest, longest, last_end = self.shortest, self.longest, self._last_end
        # An n-gram is indexed once a token follows it, so that the end of the sequence does not match itself.
        for end in range(max(self._indexed + 1, shortest), len(sequence)):
            key = hash(tuple(sequence[end - shortest : end]))
            for n in range(shortest, min(longest, end) + 1):
                if n > shortest:
                    key = hash((key, sequence[end - n]))
                previous = last_end.get(key)
                last_end[key] = end
                if previous is None:
                    break
                if n < longest and n < previous:
                    last_end[hash((key, sequence[previous - n - 1]))] = previous
        self._indexed = max(self._indexed, len(sequence) - 1)

    def find(self) -> int | None:
        """Finds the longest earlier occurrence of the sequence's end; of several, the most recent.

        Returns:
            The position of the token that followed the occurrence, or None.
        """
        sequence, shortest = self.tokens, self.shortest
        key = hash(tuple(sequence[-shortest:]))
        end = length = 0
        for n in range(shortest, min(self.longest, len(sequence) - 1) + 1):
            if n > shortest:
                key = hash((key, sequence[-n]))
            found = self._last_end.get(key)
            if found is None:  # no longer one occurred, or its match is the same
                break
            end, length = found, n
        if not length or sequence[end - length : end] != sequence[-length:]:
            return None
        return end

    def continuation(self, start: int, count: int) -> list[int]:
        """Returns `count` tokens from a position on. At the end of the sequence the copy repeats itself periodically."""
        copied = self.tokens[start : start + count]
        if copied and len(copied) < count:
            copied = (copied * (count // len(copied) + 1))[:count]
        return copied
