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

    def suits(self, row: ProposalRow, entry: ForwardRow) -> bool:
        """Whether it is to run a row: one that drafts, or has as few new entries as verification leaves."""
        return most_tokens(row) > 0 or len(entry.tokens) <= 1 + self._length

    def draft(self, rows: Sequence[ProposalRow], entries: Sequence[ForwardRow]) -> tuple[torch.Tensor, list[int]]:
        """The most likely chains, for rows with new states.

        Args:
            rows: R rows.
            entries: each row's new entries.

        Returns:
            int64 [R, K, 2] on the device, see `_choose`; and how many tokens of each row count.
        """
        counts = [most_tokens(row) for row in rows]
        found = self._loop(entries, counts, [row.new_states.start for row in rows])
        return found.transpose(0, 1), counts


def read_drafts(found: torch.Tensor, counts: Sequence[int]) -> list[TreeDraft]:
    """What `ChainLoop.draft` returns as lists with scores; waits until the device has it."""
    found = found.cpu()
    chances = found[..., 1].contiguous().view(torch.float64).tolist()
    drafts = []
    for count, ids, sure in zip(counts, found[..., 0].tolist(), chances, strict=True):
        logs = (math.log(max(chance, _LEAST)) for chance in sure[:count])
        drafts.append(TreeDraft(ids[:count], scores=list(itertools.accumulate(logs))))
    return drafts


def most_tokens(row: ProposalRow) -> int:
    """The longest chain that a row's budget allows."""
    return min(row.budget.max_nodes, row.budget.max_depth)
