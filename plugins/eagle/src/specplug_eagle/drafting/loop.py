"""Greedy chains in one launch: on a GPU, to look at a token before the next one is drafted would make the host wait."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from specplug import ForwardRow, PagedBatch, ProposalRow, Resources, argmax_with_prob
from specplug_eagle.drafting.runner import HeadRunner
from specplug_eagle.drafting.tree_draft import TreeDraft

_LEAST = 1e-38  # a probability that underflowed still has a logarithm


class ChainLoop:
    """Runs the head over a row's new entries, and on to the end of its draft.

    Args:
        runner: the head.
        resources: of the speculator.
        boundaries: whose states the head reads.
        length: the most tokens of a draft.
    """

    def __init__(self, runner: HeadRunner, resources: Resources, boundaries: Sequence[int | str], length: int) -> None:
        self._runner = runner
        self._length = length
        states: Any = resources.hidden_states
        self._loop = resources.compile_loop(
            self._begin, self._round, runner.cache, length, [states[boundary] for boundary in boundaries]
        )

    def _begin(
        self, batch: PagedBatch, ids: torch.Tensor, last: torch.Tensor, *features: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        fused = self._runner.head.fuse(features[0] if len(features) == 1 else torch.cat(features, dim=-1))
        output, feedback = self._runner.step(batch, ids, fused)
        return self._choose(output[last], feedback[last])

    def _round(
        self, batch: PagedBatch, tokens: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        return self._choose(*self._runner.step(batch, tokens, hidden))

    def _choose(self, output: torch.Tensor, feedback: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The most likely token of every row, int64, and with it the bits of its probability as a float64."""
        ids, chances = argmax_with_prob(self._runner.head.logits(output))
        tokens = self._runner.target_ids(ids)
        return [tokens, feedback], torch.stack([tokens, chances.double().view(torch.int64)], dim=-1)

    def takes(self, entries: Sequence[ForwardRow]) -> bool:
        """Whether all rows have as few new entries as verification leaves."""
        return all(len(entry.tokens) <= 1 + self._length for entry in entries)

    def tokens(self, rows: Sequence[ProposalRow], entries: Sequence[ForwardRow]) -> tuple[torch.Tensor, list[int]]:
        """The most likely chains without looking at them: int64 [R, K] on the device, and how many of each row count.

        Args:
            rows: with a budget and new states.
            entries: each row's new entries; see `takes`.
        """
        counts = [_most_tokens(row) for row in rows]
        found = self._loop(entries, counts, [row.new_states.start for row in rows])
        return found[..., 0].t(), counts

    def draft(self, rows: Sequence[ProposalRow], entries: Sequence[ForwardRow]) -> list[TreeDraft]:
        """The same as lists with scores, for any entries.

        Args:
            rows: with a budget and new states.
            entries: each row's new entries.
        """
        drafts: list[TreeDraft | None] = [None] * len(rows)
        short = [index for index, entry in enumerate(entries) if len(entry.tokens) <= 1 + self._length]
        long = [index for index, entry in enumerate(entries) if len(entry.tokens) > 1 + self._length]
        for chosen in filter(None, (short, long)):  # an ended prompt must not slow down the rows that decode
            counts = [_most_tokens(rows[index]) for index in chosen]
            places = [rows[index].new_states.start for index in chosen]
            found = self._loop([entries[index] for index in chosen], counts, places).transpose(0, 1).cpu()
            chances = found[..., 1].contiguous().view(torch.float64).tolist()
            for index, count, ids, sure in zip(chosen, counts, found[..., 0].tolist(), chances, strict=True):
                logs = (math.log(max(chance, _LEAST)) for chance in sure[:count])
                drafts[index] = TreeDraft(ids[:count], scores=list(itertools.accumulate(logs)))
        return [draft for draft in drafts if draft is not None]


def _most_tokens(row: ProposalRow) -> int:
    return min(row.budget.max_nodes, row.budget.max_depth)
