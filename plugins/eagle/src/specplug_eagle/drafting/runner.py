"""Runs the draft head over paged KV, and the state of every row."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug import ForwardRow, KVCache, PagedBatch, ProposalRow, Resources
from specplug_eagle.head import DraftHead, HeadOutput


class HeadRunner:
    """A head with its KV cache. Entry i of a row is computed from the state of token i and the embedding of token i + 1."""

    def __init__(self, head: DraftHead, resources: Resources, cache: KVCache) -> None:
        self.head = head
        self.cache = cache
        example = torch.zeros(1, head.spec.hidden_size, dtype=cache.keys[0].dtype, device=resources.device)
        self._step = resources.compile(self._layers, head, cache, [example, example])

    def _layers(self, batch: PagedBatch, embeddings: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.head(embeddings, hidden, batch.positions, batch.attend)
        return result.output, result.feedback

    def run(self, rows: Sequence[ForwardRow], tokens: torch.Tensor | None, hidden: torch.Tensor) -> HeadOutput:
        """One draft step over all rows.

        Args:
            rows: the new entries: their KV slots and masks.
            tokens: int64 [T], target ids; None means those of `rows`.
            hidden: [T, hidden]: fused target states, or the feedback of the step before.
        """
        batch = PagedBatch(rows, self.cache)
        return HeadOutput(*self.step(batch, batch.input_ids if tokens is None else tokens, hidden))

    def step(self, batch: PagedBatch, tokens: torch.Tensor, hidden: torch.Tensor) -> Sequence[torch.Tensor]:
        """The same over a batch: the input of `DraftHead.logits` and the feedback, [T, hidden] each."""
        output: Sequence[torch.Tensor] = self._step(batch, self.head.embed(tokens), hidden)
        return output

    def log_probs(self, output: torch.Tensor) -> torch.Tensor:
        """[..., hidden] → float32 log-probabilities [..., draft vocabulary]."""
        flat = self.head.logits(output.reshape(-1, output.shape[-1])).float().log_softmax(dim=-1)
        return flat.view(*output.shape[:-1], -1)

    def reported_ids(self, device: torch.device) -> torch.Tensor | None:
        """The target id of every draft id, for `DraftDistributions.token_ids`; None if they are equal."""
        if self.head.draft_to_target is None and self.head.spec.draft_vocab_size != self.head.spec.vocab_size:
            return torch.arange(self.head.spec.draft_vocab_size, device=device, dtype=torch.long)
        return self.head.draft_to_target

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Draft ids of any shape → target ids."""
        table = self.head.draft_to_target
        return draft_ids if table is None else table[draft_ids]


@attrs.frozen(eq=False)
class Roots:
    """The rows that draft in this step, with the head's output after their last committed token.

    Attributes:
        rows: R rows.
        first: for each row its first KV entry.
        output: [R, hidden], the input of `DraftHead.logits`.
        hidden: [R, hidden], the hidden state of the first level.
    """

    rows: list[ProposalRow]
    first: list[int]
    output: torch.Tensor
    hidden: torch.Tensor

    def start(self, index: int) -> int:
        """The KV index, and position, of a row's first drafted entry."""
        return len(self.rows[index].tokens) - 1


@attrs.define
class HeadSequence:
    """The valid KV entries of one row: `begin` to `end`, of which the last `spare` may turn out not to be."""

    begin: int = 0
    end: int = 0
    spare: int = 0
