"""A speculator that asks for it sees the target's top-k behind every node of its last draft, rejected ones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, Outcome, Proposal, SamplingParams, SpeculatorTraits, hookimpl
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from support.models import VOCABULARY, save_model
from support.reference import load_reference
from support.speculators import Oracle, TokenSpeculator, TreeSpeculator, provide

K = 3
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def known(folder: Path) -> list[list[int]]:
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        return [output.prompt_token_ids + output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


class Watching(TreeSpeculator):
    """Proposes random trees, and keeps what it is shown of the ones before."""

    def __init__(self, known: list[list[int]], *, declares: bool = True) -> None:
        super().__init__(Oracle(known, VOCABULARY, hit_rate=0.6), (), 7, top_k=K)
        self.traits = SpeculatorTraits(top_k=K, top_k_at_drafts=declares, max_nodes=7)
        self.last: dict[int, tuple[list[int], list[int], list[int]]] = {}
        self.seen: list[
            tuple[list[int], torch.Tensor, torch.Tensor]
        ] = []  # tokens up to a node, and what follows there
        self.outcomes: list[Outcome] = []
        self.shown = 0

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        for row in batch.rows:
            self.look(batch, row)
        proposal: Proposal = super().propose(batch)
        for row, tokens, parents in zip(batch.rows, proposal.tokens, proposal.parents, strict=True):
            self.last[row.row_id] = (list(row.tokens), list(tokens), list(parents))
        return proposal

    def look(self, batch: Any, row: Any) -> None:
        count = row.drafted.stop - row.drafted.start
        if batch.drafted_top_ids is None:
            assert count == 0
            return
        assert batch.drafted_top_ids.dtype == torch.int64
        assert batch.drafted_top_probs.dtype == torch.float32
        if row.outcome is None:
            assert count == 0
            return
        committed, tokens, parents = self.last[row.row_id]
        assert count == row.outcome.num_nodes == len(row.outcome.tokens)
        self.outcomes.append(row.outcome)
        self.shown += count
        if row.outcome.tokens != tuple(tokens):
            return  # core cut it: which nodes these are is told by their tokens alone
        paths: list[list[int]] = []
        for node, entry in enumerate(range(row.drafted.start, row.drafted.stop)):
            paths.append([*(committed if parents[node] < 0 else paths[parents[node]]), tokens[node]])
            self.seen.append((paths[-1], batch.drafted_top_ids[entry].clone(), batch.drafted_top_probs[entry].clone()))


def run(folder: Path, watching: Any, **options: Any) -> list[list[int]]:
    options = {**provide(lambda config, target: watching), **options}
    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **options) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def compare(folder: Path, watching: Watching) -> None:
    model = load_reference(folder)
    for tokens, ids, probs in watching.seen:
        with torch.no_grad():
            expected = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].softmax(dim=-1)
        torch.testing.assert_close(probs, expected.topk(K).values, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(expected[ids], probs, atol=1e-4, rtol=1e-3)


def test_the_top_k_at_drafts_is_that_of_a_full_forward(folder: Path, known: list[list[int]]) -> None:
    watching = Watching(known)
    assert run(folder, watching) == [tokens[len(prompt) :] for tokens, prompt in zip(known, PROMPTS, strict=True)]
    compare(folder, watching)
    kept = sum(len(outcome.accepted) for outcome in watching.outcomes)
    assert len(watching.seen) == watching.shown > kept > 5, "accepted and rejected nodes are both there"


def test_of_a_draft_that_core_cut_the_nodes_that_were_verified_are_shown(folder: Path, known: list[list[int]]) -> None:
    watching = Watching(known)
    run(folder, watching, max_num_draft_tokens=4)
    compare(folder, watching)
    assert watching.shown > len(watching.seen), "no draft was cut: the test lost its point"


def test_what_another_speculator_of_the_chain_drafted_is_shown_with_its_outcome(
    folder: Path, known: list[list[int]]
) -> None:
    class Second(Watching):
        @hookimpl
        def propose(self, batch: Any) -> Proposal:
            for row in batch.rows:
                if row.outcome is not None:
                    assert row.drafted.stop - row.drafted.start == len(row.outcome.tokens)
                    self.outcomes.append(row.outcome)
            return Proposal([[] for _ in batch.rows])

    second = Second(known)
    first = TokenSpeculator(Oracle(known, VOCABULARY, hit_rate=0.6))
    chain = {
        "method": "second",
        "num_speculative_tokens": 3,
        "fallback": {"method": "first", "num_speculative_tokens": 3},
    }
    plugins = {"first": lambda config, target: first, "second": lambda config, target: second}
    run(folder, second, plugins=plugins, speculative_config=chain)
    assert {outcome.method for outcome in second.outcomes} == {"first"}


def test_what_is_not_declared_is_not_handed_over(folder: Path, known: list[list[int]]) -> None:
    watching = Watching(known, declares=False)
    run(folder, watching)
    assert not watching.seen


def test_the_plan_counts_what_is_handed_over(folder: Path, known: list[list[int]]) -> None:
    buffers = []
    for declares in (False, True):
        watching = Watching(known, declares=declares)
        options = provide(lambda config, target, made=watching: made)
        plan = plan_engine(EngineConfig.create(folder, max_num_batched_tokens=100, memory="64MiB", **options)).plan
        buffers.append(plan.buffers)
    assert buffers[1] - buffers[0] == 100 * K * (8 + 4)


def test_it_needs_a_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="top_k_at_drafts=True without top_k"):
        SpeculatorTraits(top_k_at_drafts=True)
