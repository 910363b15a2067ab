"""What `verify` gets, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    import torch

    from specplug.contract.types import TokenView
    from specplug.sampling.params import SamplingParams
    from specplug.sampling.randomness import RowRandomness


@attrs.define(eq=False)
class VerificationRow:
    """One sequence in `verify`.

    Attributes:
        row_id: the number that identifies the row, as in `ProposalRow`.
        method: the method that drafted for it; None if there is no draft.
        tokens: all committed ids; the last one is the root of the draft.
        num_prompt_tokens: how many of `tokens` are the prompt.
        sampling: the request's sampling parameters.
        randomness: the row's random streams: separate ones for drafting, acceptance and residual sampling.
    """

    row_id: int
    method: str | None
    tokens: TokenView
    num_prompt_tokens: int
    sampling: SamplingParams
    randomness: RowRandomness

    @property
    def output_index(self) -> int:
        """The next token's index in the output."""
        return len(self.tokens) - self.num_prompt_tokens


@attrs.define(eq=False)
class VerificationBatch:
    """The rows of one `verify` call.

    Attributes:
        rows: all rows that produce a token in this step, with or without a draft.
    """

    rows: list[VerificationRow]


@attrs.define(eq=False)
class Verdict:
    """The result of verification, per row in the order of the batch. Integers may be those of numpy or torch.

    Attributes:
        accepted: the accepted nodes from the root down, as indices of the row's proposal.
        next_tokens: the token after the last accepted node (or the root): the bonus token, or a sample of the residual
            distribution.
    """

    accepted: Sequence[Sequence[int]]
    next_tokens: Sequence[int]


class TargetDistributions(Protocol):
    """The target's next-token distributions: per row one after the root, then one after each node.

    Attributes:
        offsets: for each row the index of its first entry, then the number of entries. The distribution after node i of row r
            is entry `offsets[r] + 1 + i`.
        logits: [entries, vocabulary]: the model's logits, before sampling parameters.
    """

    offsets: Sequence[int]
    logits: torch.Tensor

    def argmax(self, entries: Sequence[int]) -> list[int]:
        """The most likely token at each entry, after penalties, bias and bans of the row's sampling parameters."""
        ...

    def probs(self, entries: Sequence[int]) -> torch.Tensor:
        """float32 [len(entries), vocabulary]: the distributions after all sampling parameters of their rows."""
        ...
