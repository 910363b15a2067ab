"""A speculator that drafts a whole chain in one launch: on a GPU its rounds are one CUDA graph, and its drafts stay there.

It drafts early: the loop starts before the host knows what was accepted of the drafts before.

python examples/draft_loop.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import specplug_draft_model
from specplug import (
    LLM,
    ForwardRow,
    MemoryBudget,
    MemoryRegion,
    ModelHandle,
    PagedBatch,
    Proposal,
    ProposalBatch,
    Resources,
    SamplingParams,
    SpeculativeConfig,
    SpeculatorTraits,
    TargetModel,
    hookimpl,
)

LoopResult = tuple[list[torch.Tensor], torch.Tensor]


class LoopedDraft:
    """The most likely chains of a small causal LM with the target's vocabulary."""

    traits = SpeculatorTraits(drafts_early=True)

    def __init__(self, config: SpeculativeConfig, target: TargetModel) -> None:
        self.model: ModelHandle = target.model(str(Path(specplug_draft_model.__file__).parent / "tiny"))
        self.length = config.num_speculative_tokens
        self.loop: Callable[..., torch.Tensor]

    @hookimpl
    def plan_memory(self, budget: MemoryBudget) -> list[MemoryRegion]:
        """Weights, a KV cache that shares the target's block tables, and the logits of the loop's rounds."""
        logits = (1 + self.length) * budget.loop_rows * self.model.vocab_size * torch.float32.itemsize
        return [
            *self.model.regions(scratch_tokens_per_row=self.length),
            MemoryRegion("draft logits", "buffers", fixed_bytes=logits),
        ]

    @hookimpl
    def warmup(self, resources: Resources) -> None:
        """Captures the loop on a GPU, for as many new tokens as `propose` runs: those that came, and the one before them."""
        self.loop = resources.compile_loop(self.begin, self.round, self.model.kv_cache, self.length + 1)

    def begin(self, batch: PagedBatch, ids: torch.Tensor, last: torch.Tensor) -> LoopResult:
        """Runs the new tokens of all rows: each row's first draft token."""
        tokens = self.model.step(batch, ids, last).argmax(-1)
        return [tokens], tokens

    def round(self, batch: PagedBatch, ids: torch.Tensor) -> LoopResult:
        """Runs one token of every row: its next draft token."""
        tokens = self.model.step(batch, ids).argmax(-1)
        return [tokens], tokens

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        """Runs what is new in every row, and drafts as much as budgets allow."""
        lengths = [min(row.budget.max_nodes, row.budget.max_depth, self.length) for row in batch.rows]
        chosen = []
        for index, (row, length) in enumerate(zip(batch.rows, lengths, strict=True)):
            start = row.new_positions.start
            stop = len(row.tokens) if length else row.new_positions.stop  # the last token is the draft's root
            tokens = row.tokens[start:stop]
            if row.upcoming is not None:  # the root is on the device
                tokens += row.upcoming.placeholders
            if tokens and row.table is not None:
                chosen.append((index, ForwardRow(tokens, start, row.table, upcoming=row.upcoming)))
        if not chosen:
            return Proposal([[]] * len(lengths))
        with torch.inference_mode():
            counts = [lengths[index] for index, _ in chosen]  # a row without a budget is only run
            drafts = self.loop([row for _, row in chosen], counts).t()
        if len(chosen) == len(lengths):
            return Proposal(drafts, lengths=lengths)
        found = {index: tokens for (index, _), tokens in zip(chosen, drafts.tolist(), strict=True)}
        return Proposal([found[index][:length] if length else [] for index, length in enumerate(lengths)])


def main() -> None:
    """Runs it and prints how many of its drafts were accepted."""
    plugins = {"looped": LoopedDraft}
    config = {"method": "looped", "num_speculative_tokens": 3}
    with LLM("tiny", plugins=plugins, speculative_config=config) as llm:
        outputs = llm.generate(["import os\n", "def main("], SamplingParams(temperature=0, max_tokens=32))
        print(outputs[0].outputs[0].text)
        print(outputs[0].outputs[0].metrics.by_method)


if __name__ == "__main__":
    main()
