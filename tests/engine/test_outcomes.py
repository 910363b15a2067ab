"""A speculator is told what became of its own proposals, however often others draft in between."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from specplug import LLM, Outcome, Proposal, ProposalBatch, SamplingParams, hookimpl
from support.models import VOCABULARY, save_model
from support.reference import generate


class Turns:
    """Drafts the known continuation in some of its turns, and notes what it is told."""

    def __init__(self, known: list[int], drafts_when: Any) -> None:
        self.known = known
        self.drafts_when = drafts_when
        self.expected: int | None = None
        self.told: list[tuple[Outcome | None, int | None]] = []

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        drafts = []
        for row in batch.rows:
            self.told.append((row.outcome, self.expected))
            self.expected = None
            length = len(row.tokens)
            draft = self.known[length : length + row.budget.max_nodes] if self.drafts_when(length) else []
            if len(draft) > 1:
                draft[-1] = (draft[-1] + 1) % VOCABULARY
                self.expected = len(draft) - 1
            drafts.append(draft)
        return Proposal(drafts)


@pytest.mark.parametrize("same_name", [False, True])
def test_each_link_of_a_chain_hears_of_its_own_drafts(tmp_path: Path, same_name: bool) -> None:
    folder = save_model(tmp_path, "llama", eos_token_id=None)
    prompt = [5, 9, 33, 12]
    known = prompt + generate(folder, prompt, 60)[0]
    chooser = random.Random(3)
    first = Turns(known, lambda length: chooser.random() < 0.3)
    second = Turns(known, lambda length: chooser.random() < 0.6)
    made = iter([first, second])
    names = ["turns", "turns"] if same_name else ["turns", "other"]
    config = {
        "method": names[0],
        "num_speculative_tokens": 3,
        "fallback": {"method": names[1], "num_speculative_tokens": 4},
    }
    plugins = {name: lambda config, target: next(made) for name in names}
    with LLM(
        folder, skip_tokenizer_init=True, strict=True, plugins=plugins, speculative_config=config, memory="32MiB"
    ) as llm:
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
    for speculator, method in ((first, names[0]), (second, names[1])):
        heard = [(outcome, expected) for outcome, expected in speculator.told if expected is not None]
        assert len(heard) > 3
        for outcome, expected in heard:
            assert outcome is not None
            assert (outcome.method, len(outcome.accepted)) == (method, expected)
        assert all(
            outcome is None or outcome.method != method for outcome, expected in speculator.told if expected is None
        )
