"""Drafts that stay on the device: the target's forward takes them from there, and the host reads them later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, ProposalBatch, SamplingParams, hookimpl
from specplug.contract.types import Proposal
from specplug.model.pending import PendingTokens
from support.drafting import perturbed_copy
from support.early import Early, early
from support.engines import squeeze_blocks
from support.models import VOCABULARY, save_model
from support.reference import decisive_prompts
from support.speculators import TokenSpeculator, provide

NEW_TOKENS = 16
ROWS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
TIGHT: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 24, "block_size": 4, "max_model_len": 72}


def looping(draft: Path, made: list[Early], length: int | str = 3) -> dict[str, Any]:
    """A draft model that drafts as on a GPU, after the host knows what was accepted."""
    options = early(draft, made, drafts_early=False)
    options["speculative_config"]["num_speculative_tokens"] = length
    return options


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is treated as a device that computes while the host goes on."""
    monkeypatch.setattr("specplug.engine.startup.allocation.computes_ahead", lambda device: True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_output_is_that_of_plain_decoding(tmp_path: Path, architecture: str) -> None:
    folder = save_model(tmp_path / "target", architecture)
    draft = perturbed_copy(folder, tmp_path / "draft", 0.03)
    pairs = decisive_prompts(folder, ROWS, NEW_TOKENS, VOCABULARY)
    made: list[Early] = []
    options = looping(draft, made)
    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **TIGHT, **options) as llm:
        squeeze_blocks(llm, 14)
        outputs = [output.outputs[0].token_ids for output in llm.generate([prompt for prompt, _ in pairs], GREEDY)]
        assert outputs == [expected for _, expected in pairs]
        assert llm.engine.scheduler.num_preemptions > 0
        assert llm.engine.stats.num_accepted_draft_tokens > 10
    assert made[0].num_left > 5


def test_sampled_rows_match_deterministic_drafts(tmp_path: Path) -> None:
    """Seeded output depends on the request alone, so it is that of plain decoding."""
    folder = save_model(tmp_path / "target", "llama")
    made: list[Early] = []
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=12) for seed in range(4)]
    prompts = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12]]
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **looping(folder, made)) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
        assert llm.engine.stats.num_accepted_draft_tokens > 0
    assert made[0].num_left > 3


def test_scores_are_asked_for_where_they_have_a_use(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "target", "llama")
    made: list[Early] = []
    for limit in (None, 4):
        options = looping(folder, made, "auto") | {"max_num_draft_tokens": limit}
        with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **options) as llm:
            llm.generate([[3, 4, 5]], GREEDY)
            assert llm.engine.stats.num_draft_tokens > 0
    assert made[0].num_left > 0
    assert made[1].num_left == 0


def test_automatic_lengths_with_rows_that_join_and_rest(tmp_path: Path) -> None:
    """Prompts, rows that sleep and rows that draft share a loop: all drafts of a step stay on the device."""
    folder = save_model(tmp_path / "target", "llama")
    draft = perturbed_copy(folder, tmp_path / "draft", 0.03)
    pairs = decisive_prompts(folder, ROWS, NEW_TOKENS, VOCABULARY)
    made: list[Early] = []
    options = looping(draft, made, "auto") | {"max_num_seqs": 3}
    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **options) as llm:
        outputs = [output.outputs[0].token_ids for output in llm.generate([prompt for prompt, _ in pairs], GREEDY)]
        assert outputs == [expected for _, expected in pairs]
        assert llm.engine.stats.num_accepted_draft_tokens > 10
    assert made[0].num_left > 5


def test_an_id_outside_the_vocabulary_is_a_fault_and_harmless(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "target", "llama")

    class Broken(TokenSpeculator):
        @hookimpl
        def propose(self, batch: ProposalBatch) -> Proposal:
            return Proposal(torch.full((len(batch.rows), 2), VOCABULARY + 7, dtype=torch.int64, device="cpu"))

    prompts = [[3, 4, 5], [6, 7]]
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    options = provide(lambda config, target: Broken(lambda tokens, count: []))
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", **options) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)] == expected
        assert sum(llm.engine.faults.values()) == 3
        assert not any(llm.engine.chain.enabled.values())


def test_placeholders_become_ids_and_are_read_once_they_are_needed() -> None:
    device = torch.device("cpu")
    pending = PendingTokens(8, vocab_size=50, device=device)
    first, second = pending.put(torch.tensor([[5, 6, 7], [8, 9, 99]]), [3, 2])
    ids = torch.tensor([1, *first.placeholders, 2, *second.placeholders])
    pending.fill(ids)
    assert ids.tolist() == [1, 5, 6, 7, 2, 8, 9]
    (third,) = pending.put(torch.tensor([[60, 1]]), [2])
    assert (first.read(), second.read(), second.error) == ([5, 6, 7], [8, 9], None)
    ids = torch.tensor([*third.placeholders])
    pending.fill(ids)
    assert ids.tolist() == third.read() == [49, 1]
    assert third.error == "draft token 60 is not an id of the target's vocabulary of 50"
