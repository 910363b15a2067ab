"""The `draft_model` method: runs the draft model over new committed tokens, then drafts for all rows together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import torch

from specplug import (
    BlockTable,
    Budget,
    DraftDistributions,
    ForwardRow,
    MemoryRegion,
    OwnTables,
    Proposal,
    SpeculatorTraits,
    hookimpl,
)
from specplug_draft_model.loop import DraftLoop
from specplug_draft_model.row_draft import RowDraft
from specplug_draft_model.sequence import DraftSequence
from specplug_draft_model.settings import DraftModelSettings
from specplug_draft_model.token_selection import draw
from specplug_draft_model.vocabulary import VocabularyMap

if TYPE_CHECKING:
    from specplug import (
        MemoryBudget,
        ModelHandle,
        ProposalBatch,
        ProposalRow,
        Resources,
    )

_LEAST = 1e-30
_WIDTHS = 16
"""Hidden sizes that a layer's intermediate results of a token take, gated MLP included."""
_COPIES_TO_DRAW = 8
"""Copies of a row's distribution that exist at once while it is truncated (sorted values and indices, sums, scattered) and
sampled from. The distributions of earlier tokens exist too, and at the end all of them twice, when they are stacked."""


@attrs.define(eq=False)
class DraftModelSpeculator:
    """Drafts chains with a causal LM. Its KV cache uses the target's block tables, or its own in engines that share none.

    Attributes:
        method: the configured method.
        model: the handle of the draft model.
        vocabulary: the tokens that target and draft share.
        settings: the user's settings.
        num_speculative_tokens: the most tokens of a draft.
        may_stop: whether budgets may have stop criteria, which need the probabilities of draft tokens.
        max_model_len: longer rows get no drafts.
        max_num_batched_tokens: the most tokens of one forward.
        device: the target's device.
    """

    method: str
    model: ModelHandle
    vocabulary: VocabularyMap
    settings: DraftModelSettings
    num_speculative_tokens: int
    may_stop: bool
    max_model_len: int
    max_num_batched_tokens: int
    device: torch.device
    _sequences: dict[int, DraftSequence] = attrs.field(factory=dict, init=False, repr=False)
    _target_ids: list[int] | None = attrs.field(default=None, init=False, repr=False)
    _draft_ids: list[int] | None = attrs.field(default=None, init=False, repr=False)
    _reported_ids: torch.Tensor | None = attrs.field(default=None, init=False, repr=False)
    _loop: DraftLoop | None = attrs.field(default=None, init=False, repr=False)
    _most_rows: int | None = attrs.field(default=None, init=False, repr=False)
    _tables: OwnTables | None = attrs.field(default=None, init=False, repr=False)

    @property
    def traits(self) -> SpeculatorTraits:
        """On a GPU it drafts early: a loop finds out there what was accepted, unless token ids must be mapped by the host."""
        on_gpu = self.model.device.type != "cpu" and self.model.device == self.device and not self.model.has_state
        has_all = self.vocabulary.known is None and self.vocabulary.is_target_whole
        return SpeculatorTraits(drafts_early=on_gpu and has_all and not self.settings.draft_confidence_threshold)

    @property
    def samples(self) -> bool:
        """Whether drafts are sampled for rows that gain by it."""
        return self.settings.draft_sample_method == "probabilistic"

    @hookimpl
    def plan_memory(self, budget: MemoryBudget) -> list[MemoryRegion]:
        """The draft model's weights and KV cache, and the peak of drafting: logits, and distributions of sampled drafts."""
        rows = budget.max_num_seqs
        self._most_rows = None if budget.shares_tables else rows
        bytes_ = 2 * rows * self.model.vocab_size * self.model.dtype.itemsize
        bytes_ += 3 * budget.loop_rows * self.model.vocab_size * torch.float32.itemsize
        width = self.model.config.get_text_config().hidden_size
        bytes_ += budget.loop_tokens(self.num_speculative_tokens) * _WIDTHS * width * self.model.dtype.itemsize
        if self.samples:
            held = max(2 * self.num_speculative_tokens, self.num_speculative_tokens + _COPIES_TO_DRAW)
            bytes_ += rows * held * self.vocabulary.size * torch.float32.itemsize
        elif self.may_stop and self.model.device.type != "cpu":  # on a GPU a token's probability needs a softmax
            bytes_ += rows * self.vocabulary.size * torch.float32.itemsize
        return [
            *self.model.regions(
                scratch_tokens_per_row=self.num_speculative_tokens,
                tables="shared" if budget.shares_tables else "own",
            ),
            MemoryRegion("draft distributions", "buffers", fixed_bytes=bytes_),
        ]

    @hookimpl
    def warmup(self, resources: Resources) -> None:
        """Moves the vocabulary map to the draft's device, and runs every number of rows once."""
        self._tables = None if self._most_rows is None else OwnTables(resources, self._most_rows)
        self.vocabulary = self.vocabulary.on(self.model.device)
        if self.vocabulary.target_ids is not None and self.vocabulary.draft_ids is not None:
            self._target_ids = self.vocabulary.target_ids.tolist()
            self._draft_ids = self.vocabulary.draft_ids.tolist()
        self._reported_ids = self.vocabulary.reported_ids(self.device)
        if self.model.device.type != "cpu" and not self.model.has_state:
            self.use_loop(resources)
        for count in resources.row_buckets if self.model.device.type != "cpu" else (1,):
            rows = []
            for block in range(min(count, resources.num_blocks)):
                table = BlockTable(resources.block_size)
                table.extend([block])
                rows.append(ForwardRow([self.vocabulary.unknown], 0, table, slot=block))
            self.model.forward(rows)

    def use_loop(self, resources: Resources) -> None:
        """Drafts greedily without looking at the tokens in between; pays where the host would wait for them."""
        self._loop = DraftLoop(self.model, self.vocabulary, resources, self.num_speculative_tokens)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        """Drafts a chain for every row with a budget that is within the draft's context."""
        if self._tables is not None:
            self._tables.give(batch)
        for row_id, _ in batch.ended:
            self._sequences.pop(row_id, None)
        drafts = [self._begin_draft(row) for row in batch.rows]
        if any(row.upcoming is not None for row in batch.rows):
            return self._draft_early(drafts)
        if self._loop is not None and not (self.samples and any(row.gains_by_sampling for row in batch.rows)):
            chosen = self._loop.suited(drafts, self.max_num_batched_tokens)
            threshold = self.settings.draft_confidence_threshold
            is_all = 0 < len(chosen) == len(drafts)
            if is_all and not batch.uses_scores and not threshold:
                return Proposal(self._loop.run(chosen)[..., 0].t(), lengths=[draft.max_tokens for draft in chosen])
            self._loop.fill(chosen, threshold)
        logits = self._catch_up(drafts)
        active = [draft for draft in drafts if draft.max_tokens and not draft.tokens]
        asks = any(row.budget.may_stop for row in batch.rows)
        while active and logits is not None:
            active, logits = self._extend(active, logits, asks)
        return Proposal(
            tokens=[draft.tokens for draft in drafts],
            scores=[[math.log(max(c, _LEAST)) for c in draft.chances] or None for draft in drafts],
            probs=[self._distributions(draft) for draft in drafts],
        )

    def _begin_draft(self, row: ProposalRow) -> RowDraft:
        """A draft without tokens. A row beyond the draft's context is run up to that: a shorter row may find its blocks."""
        most = self._most_tokens(row)
        stop = len(row.tokens) if most else min(row.new_positions.stop, len(row.tokens), self.max_model_len)
        is_within = len(row.tokens) + (0 if row.upcoming is None else len(row.upcoming)) <= self.max_model_len
        return RowDraft(row, self._follow(row), most, stop, row.upcoming if is_within else None)

    def _most_tokens(self, row: ProposalRow) -> int:
        room = self.max_model_len - len(row.tokens) - (0 if row.upcoming is None else len(row.upcoming)) + 1
        return max(0, min(row.budget.max_nodes, row.budget.max_depth, self.num_speculative_tokens, room))

    def _draft_early(self, drafts: Sequence[RowDraft]) -> Proposal:
        """Drafts after tokens that the host does not know yet. Rows with more new tokens than a loop runs catch up first."""
        assert self._loop is not None, "a speculator that drafts early has a loop"
        chosen = self._loop.suited(drafts, self.max_num_batched_tokens)
        if len(chosen) < len(drafts):
            suited = {id(draft) for draft in chosen}
            self._catch_up([draft for draft in drafts if id(draft) not in suited])
            chosen = self._loop.suited(drafts, self.max_num_batched_tokens)
        if len(chosen) == len(drafts):
            return Proposal(self._loop.run(chosen)[..., 0].t(), lengths=[draft.max_tokens for draft in chosen])
        tokens = torch.zeros(len(drafts), self.num_speculative_tokens, dtype=torch.int64, device=self.device)
        lengths = [0] * len(drafts)
        if chosen:
            found = self._loop.run(chosen)[..., 0].t()
            place_of = {id(draft): place for place, draft in enumerate(drafts)}
            places = [place_of[id(draft)] for draft in chosen]
            for place in places:
                lengths[place] = drafts[place].max_tokens
            tokens[torch.tensor(places, dtype=torch.int64, device=self.device), : found.shape[1]] = found
        return Proposal(tokens, lengths=lengths)

    def _follow(self, row: ProposalRow) -> DraftSequence:
        """A row's sequence, after it has learned what became of the last draft."""
        if row.is_new:
            self._sequences[row.row_id] = DraftSequence.begin(row, self.model)
        sequence = self._sequences[row.row_id]
        sequence.settle(row, self.method)
        return sequence

    def _catch_up(self, drafts: Sequence[RowDraft]) -> torch.Tensor | None:
        """Processes the committed tokens that the draft model has not seen: usually one or two of a row.

        Returns:
            The draft model's logits [N, draft vocabulary] after the last token of each of the N rows that may draft.
        """
        waiting: list[tuple[int, DraftSequence, int]] = []
        for index, draft in enumerate(drafts):
            if draft.num_new > 0:
                waiting.append((index, draft.sequence, draft.stop))
        last: dict[int, torch.Tensor] = {}
        while waiting:
            rows, finished, room = [], [], self.max_num_batched_tokens
            for place, (index, sequence, stop) in enumerate(waiting):
                row, start = drafts[index].row, sequence.num_stored
                sequence.num_stored = min(stop, start + room)
                room -= sequence.num_stored - start
                assert row.table is not None, "core gives every row its blocks"
                tokens = self.vocabulary.to_draft(row.tokens[start : sequence.num_stored])
                rows.append(ForwardRow(tokens, start, row.table, slot=row.row_id))
                if sequence.num_stored == stop and drafts[index].max_tokens:
                    finished.append((index, place))
                if room == 0:
                    break
            logits = self.model.forward(rows)
            last.update((index, logits[place]) for index, place in finished)
            waiting = [entry for entry in waiting if entry[1].num_stored < entry[2]]
        active = [index for index, draft in enumerate(drafts) if index in last]
        return torch.stack([last[index] for index in active]) if active else None

    def _extend(
        self, active: list[RowDraft], logits: torch.Tensor, asks: bool
    ) -> tuple[list[RowDraft], torch.Tensor | None]:
        """Drafts one token for every row, and runs the draft model over those that another token may follow.

        Returns:
            The rows that continue, and their logits [N, draft vocabulary].
        """
        draws = draw(
            self.vocabulary.restrict(logits),
            [draft.row for draft in active],
            sample=self.samples,
            threshold=self.settings.draft_confidence_threshold,
            asks=asks,
        )
        going = []
        for draft, token, probs, chance in zip(active, draws.tokens, draws.probs, draws.chances, strict=True):
            if token is None:
                continue
            draft.tokens.append(token if self._target_ids is None else self._target_ids[token])
            draft.last = token if self._draft_ids is None else self._draft_ids[token]
            if probs is not None:
                draft.probs.append(probs)
            if chance is not None:
                draft.chances.append(chance * (draft.chances[-1] if draft.chances else 1.0))
            if len(draft.tokens) < draft.max_tokens:
                going.append(draft)
        chances = [draft.chances[-1] if draft.chances else None for draft in going]
        going = list(itertools.compress(going, Budget.worth_extending([draft.row.budget for draft in going], chances)))
        if not going:
            return [], None
        rows = []
        for draft in going:
            row = draft.row
            assert row.table is not None
            start = len(row.tokens) + len(draft.tokens) - 1
            draft.sequence.num_speculative += 1
            held = draft.sequence.num_speculative
            rows.append(ForwardRow([draft.last], start, row.table, slot=row.row_id, held=held))
        return going, self.model.forward(rows)

    def _distributions(self, draft: RowDraft) -> DraftDistributions | None:
        if not draft.probs:
            return None
        return DraftDistributions(torch.stack(draft.probs).to(self.device), token_ids=self._reported_ids)
