"""Finds earlier occurrences of the end of a growing token sequence, at a cost that does not grow with its length.

It knows nothing about batches, budgets or configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence


@attrs.define(eq=False)
class NgramIndex:
    """Where every n-gram of a sequence last ended, kept up to date as tokens are appended.

    A shortest n-gram is keyed by the hash of its tokens; a longer one by the hash of its first token and of the key of
    the rest. So every further length costs one small step, and one dict serves all lengths. A longer n-gram is stored
    only once the rest has occurred before (until then the rest leads to the same place), which keeps wide ranges small
    on text that does not repeat itself. A match is compared token by token before it is returned: a collision of hashes
    can hide a match, but never make one up.

    Attributes:
        shortest: the fewest tokens that make a match.
        longest: the most tokens that are compared.
        tokens: the sequence so far.
    """

    shortest: int
    longest: int
    tokens: list[int] = attrs.field(factory=list, init=False)
    _indexed: int = attrs.field(default=0, init=False)
    _last_end: dict[int, int] = attrs.field(factory=dict, init=False, repr=False)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens. The cost is that of the new tokens alone."""
        sequence = self.tokens
        sequence.extend(tokens)
        shortest, longest, last_end = self.shortest, self.longest, self._last_end
        # An n-gram is indexed when a token has followed it, so that the end of the sequence never finds itself.
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
        """Returns where the most recent of the longest earlier occurrences of the sequence's end ends, or None.

        The position is that of the token that followed the occurrence.
        """
        sequence, shortest = self.tokens, self.shortest
        key = hash(tuple(sequence[-shortest:]))
        end = length = 0
        for n in range(shortest, min(self.longest, len(sequence) - 1) + 1):
            if n > shortest:
                key = hash((key, sequence[-n]))
            found = self._last_end.get(key)
            if found is None:  # a longer one never occurred, or only where this one did
                break
            end, length = found, n
        if not length or sequence[end - length : end] != sequence[-length:]:
            return None
        return end

    def continuation(self, start: int, count: int) -> list[int]:
        """Returns `count` tokens from a position on; past the end of the sequence the copy goes on through itself."""
        copied = self.tokens[start : start + count]
        if copied and len(copied) < count:
            copied = (copied * (count // len(copied) + 1))[:count]
        return copied
