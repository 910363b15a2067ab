"""A proposal that is compared with the text that comes, and never verified."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from specplug.speculation.draft import Draft


@attrs.frozen(eq=False)
class Guess:
    """What one speculator expected of a sleeping row.

    Attributes:
        length: how many tokens the row had.
        candidates: for the next one.
    """

    length: int
    candidates: frozenset[int]

    @classmethod
    def of(cls, draft: Draft, length: int) -> Guess:
        """The first level of a draft for a row with so many tokens."""
        roots = [token for token, parent in zip(draft.tokens, draft.parent_list(), strict=True) if parent < 0]
        return cls(length, frozenset(roots))

    def came_true(self, tokens: Sequence[int]) -> bool | None:
        """Whether the row's next token was among the candidates; None before it is known."""
        return tokens[self.length] in self.candidates if len(tokens) > self.length else None
