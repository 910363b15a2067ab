"""A speculator that drafts before the host knows what was accepted, on a CPU that is treated as a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import specplug_draft_model
from specplug import LLM, Proposal, ProposalBatch, Resources, SpeculatorTraits, hookimpl
from specplug.contract.resources import no_compile
from specplug.model.compile.staged_loop import StagedLoop


@attrs.define(eq=False)
class Early:
    """A speculator that drafts as on a GPU. It counts its calls, those with upcoming tokens, and proposals that may stay."""

    inner: Any
    drafts_early: bool = True
    num_early: int = 0
    num_calls: int = 0
    num_left: int = 0

    @property
    def traits(self) -> SpeculatorTraits:
        return attrs.evolve(self.inner.traits, drafts_early=self.drafts_early)

    @hookimpl
    def plan_memory(self, budget: Any) -> Any:
        return self.inner.plan_memory(budget)

    @hookimpl
    def warmup(self, resources: Resources) -> None:
        self.inner.warmup(resources)
        self.inner.use_loop(resources)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        self.num_calls += 1
        self.num_early += any(row.upcoming is not None for row in batch.rows)
        proposal: Proposal = self.inner.propose(batch)
        self.num_left += isinstance(proposal.tokens, torch.Tensor)
        return proposal


def early(
    draft: Path | str,
    made: list[Early],
    drafts_early: bool = True,
    *,
    kind: type[Early] = Early,
    load: Any = specplug_draft_model.load_speculator,
) -> dict[str, Any]:
    def make(config: Any, target: Any) -> Early:
        made.append(kind(load(config, target), drafts_early))
        return made[-1]

    config = {"method": "early", "model": str(draft), "num_speculative_tokens": 3, "draft_sample_method": "greedy"}
    return {"plugins": {"early": make}, "speculative_config": config}


def treat_cpu_as_gpu(monkeypatch: pytest.MonkeyPatch, *, staged: bool) -> None:
    """The host goes on while the device computes; loops run from Python, or over the buffers that CUDA graphs hold."""
    monkeypatch.setattr("specplug.engine.startup.allocation.computes_ahead", lambda device: True)
    if not staged:
        return

    def loop(
        begin: Any, step: Any, cache: Any, most: int, inputs: Any = (), *, most_rows: int, accepted: Any
    ) -> StagedLoop:
        return StagedLoop(begin, step, cache, most, inputs, [1, 2, most_rows], accepted)

    monkeypatch.setattr("specplug.engine.startup.assembly.compile_loop", loop)
    monkeypatch.setattr("specplug.engine.startup.assembly.compile_step", no_compile)
    monkeypatch.setattr("specplug.engine.startup.assembly.wants_compilation", lambda *_: True)


def outputs(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
