"""What verification sees and what it decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    import torch


@attrs.define(eq=False)
class Verdict:
    """What verification decided, per row in the order of the batch. Integers may be those of numpy or of tensors.

    Attributes:
        accepted: the accepted nodes from the root down, as indices of the row's proposal.
        next_tokens: the token that follows the last accepted node (or the root): the bonus token, or the one drawn from
            the residual distribution.
    """

    accepted: Sequence[Sequence[int]]
    next_tokens: Sequence[int]


class TargetDistributions(Protocol):
    """The target's view of the batch. Each row owns 1 + (number of its nodes) consecutive entries.

    A row's first entry is the distribution after its root, entry 1 + i the one after node i.

    Attributes:
        offsets: for each row, the index of its first entry; one more at the end.
        logits: [entries, vocabulary]: the model's own logits.
    """

    offsets: Sequence[int]
    logits: torch.Tensor

    def argmax(self, entries: Sequence[int]) -> list[int]:
        """The most likely token at each entry, after everything in the sampling parameters that can change it."""
        ...

    def probs(self, entries: Sequence[int]) -> torch.Tensor:
        """float32 [len(entries), vocabulary]: the distributions after all of each row's sampling parameters."""
        ...
