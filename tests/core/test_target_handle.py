"""What the target lends to speculators: embeddings, logits, weights and models, lazily and exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, ForwardRow, MemoryRegion, Proposal, SamplingParams, SpeculatorTraits, hookimpl
from specplug.errors import PluginError
from support.models import ARCHITECTURES, save_model
from support.reference import load_reference
from support.speculators import provide

EXTRA = {"granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0}, "cohere2": {"sliding_window": 6}}


class Borrower:
    """Computes the target's own next-token logits from its final states, and keeps what it saw."""

    traits = SpeculatorTraits(hidden_states=("final",))

    def __init__(self, target: Any, folder: Path) -> None:
        self.target = target
        self.weights = target.weights(str(folder))
        self.logits: list[torch.Tensor] = []
        self.tokens: list[int] = []

    @hookimpl
    def plan_memory(self, budget: Any) -> list[MemoryRegion]:
        return [MemoryRegion("borrowed", "weights", fixed_bytes=self.weights.num_bytes())]

    @hookimpl
    def warmup(self, resources: Any) -> None:
        self.names = set(self.weights.tensors)
        self.embedded = self.target.embed(torch.tensor([3, 4, 5], device=resources.device))

    @hookimpl
    def propose(self, batch: Any) -> Any:
        for row in batch.rows:
            self.logits.append(self.target.logits(batch.hidden_states["final"][row.states]).cpu())
            self.tokens = list(row.tokens)
        return Proposal([[int(self.logits[-1][-1].argmax())][: row.budget.max_nodes] for row in batch.rows])


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "granite", "cohere2", "smollm3", "starcoder2"])
def test_logits_of_final_states_are_the_models_own(tmp_path: Path, architecture: str) -> None:
    folder = save_model(tmp_path, architecture, **EXTRA.get(architecture, {}))
    made: list[Borrower] = []

    def make(config: Any, target: Any) -> Borrower:
        made.append(Borrower(target, folder))
        return made[0]

    prompt = [5, 9, 3, 17, 8, 30, 12]
    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **provide(make)) as llm:
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
        borrower = made[0]
        assert llm.engine.plan.draft_weights == borrower.weights.num_bytes()
        assert borrower.names == set(borrower.weights.shapes)
    got = torch.cat(borrower.logits)
    model = load_reference(folder)
    with torch.no_grad():
        expected = model(torch.tensor([borrower.tokens]), use_cache=False).logits[0][: len(got)]
        hidden = model.get_input_embeddings()(torch.tensor([3, 4, 5]))
    torch.testing.assert_close(got, expected, atol=3e-4, rtol=1e-3)
    torch.testing.assert_close(borrower.embedded.cpu(), hidden)


def test_handles_refuse_to_work_before_the_plan_is_accepted(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    for use in (
        lambda target: target.weights(str(folder)).tensors,
        lambda target: target.logits(torch.zeros(1, 32)),
        lambda target: target.model(str(folder)).forward([ForwardRow([1], 0, None)]),
    ):
        with pytest.raises(PluginError, match="from warmup on"):
            LLM(folder, skip_tokenizer_init=True, memory="64MiB", **provide(lambda c, t, use=use: use(t)))


def test_no_weight_is_read_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    from specplug.configuration.engine import EngineConfig
    from specplug.engine.startup import plan_engine

    folder = save_model(tmp_path, "llama")
    monkeypatch.setattr(safetensors, "safe_open", lambda *args, **kwargs: pytest.fail("weights were read"))
    options = provide(lambda config, target: Borrower(target, folder))
    planned = plan_engine(EngineConfig.create(str(folder), memory="64MiB", **options))
    assert planned.plan.draft_weights > 0
