"""Whole chains in one launch: where the host would wait for every token, it does not look at those in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from specplug import ForwardRow, argmax_with_prob
from specplug_draft_model.row_draft import RowDraft
from specplug_draft_model.vocabulary import VocabularyMap

if TYPE_CHECKING:
    from specplug import ModelHandle, PagedBatch, Resources


class DraftLoop:
    """Drafts the most likely chains.

    Args:
        model: the draft model.
        vocabulary: the tokens that target and draft share, on the model's device.
        resources: compiles the loop.
        num_tokens: the most tokens of a chain.
    """

    def __init__(self, model: ModelHandle, vocabulary: VocabularyMap, resources: Resources, num_tokens: int) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._num_tokens = num_tokens
        self._loop = resources.compile_loop(self._begin, self._round, model.kv_cache, num_tokens)

    def suited(self, drafts: Sequence[RowDraft], room: int) -> list[RowDraft]:
        """Those with as few new tokens as verification leaves, and of the others those that draft and fit.

        Args:
            drafts: of all rows.
            room: the most new tokens that are run at once.
        """
        short, chosen = 1 + self._num_tokens, []
        room -= sum(max(draft.num_new, 0) for draft in drafts if draft.num_new <= short)
        for draft in drafts:
            if 0 < draft.num_new <= short:
                chosen.append(draft)
            elif draft.max_tokens and short < draft.num_new <= room:
                room -= draft.num_new
                chosen.append(draft)
        return chosen

    def run(self, chosen: Sequence[RowDraft]) -> torch.Tensor:
        """Drafts for suited rows, each as much as its budget: [K, R, 2], see `_choose`."""
        rows = []
        for draft in chosen:
            row, stored = draft.row, draft.sequence.num_stored
            assert row.table is not None, "core gives every row its blocks"
            tokens = self._vocabulary.to_draft(row.tokens[stored : draft.stop])
            if draft.upcoming is not None:
                tokens = [*tokens, *draft.upcoming.placeholders]
            rows.append(ForwardRow(tokens, stored, row.table, upcoming=draft.upcoming))
        with torch.inference_mode():
            found: torch.Tensor = self._loop(rows, [draft.max_tokens for draft in chosen])
        for draft in chosen:
            draft.sequence.num_stored = draft.stop
            draft.sequence.was_early = draft.upcoming is not None
            draft.sequence.num_speculative += max(draft.max_tokens - 1, 0)
        return found

    def fill(self, chosen: Sequence[RowDraft], threshold: float) -> None:
        """Gives suited rows their chains, each up to its first token that is less probable than the threshold."""
        if not chosen:
            return
        found = self.run(chosen).transpose(0, 1).cpu()
        chances = found[..., 1].contiguous().view(torch.float64).tolist()
        for draft, tokens, chain in zip(chosen, found[..., 0].tolist(), chances, strict=True):
            chance = 1.0
            for token, sure in zip(tokens[: draft.max_tokens], chain, strict=False):
                if sure < threshold:
                    draft.max_tokens = len(draft.tokens)
                    break
                chance *= sure
                draft.tokens.append(token)
                draft.chances.append(chance)

    def _choose(self, logits: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """[N, draft vocabulary] → the draft's id of the most likely shared token; the target's, with its probability's bits."""
        ids, chances = argmax_with_prob(self._vocabulary.restrict(logits))
        own, theirs = self._vocabulary.draft_ids, self._vocabulary.target_ids
        columns = [ids if theirs is None else theirs[ids], chances.double().view(torch.int64)]
        return [ids if own is None else own[ids]], torch.stack(columns, dim=-1)

    def _begin(
        self, batch: PagedBatch, ids: torch.Tensor, last: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        return self._choose(self._model.step(batch, ids, last))

    def _round(self, batch: PagedBatch, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        return self._choose(self._model.step(batch, ids))
