"""What the target lends to speculators: embeddings, logits, weights and models, lazily and exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, BlockTable, ForwardRow, MemoryRegion, Proposal, SamplingParams, SpeculatorTraits, hookimpl
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
            self.logits.append(self.target.logits(batch.hidden_states["final"][row.new_states]).cpu())
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

    from specplug.config.engine import EngineConfig
    from specplug.engine.planning import plan_engine

    folder = save_model(tmp_path, "llama")
    monkeypatch.setattr(safetensors, "safe_open", lambda *args, **kwargs: pytest.fail("weights were read"))
    options = provide(lambda config, target: Borrower(target, folder))
    planned = plan_engine(EngineConfig.create(str(folder), memory="64MiB", **options))
    assert planned.plan.draft_weights > 0


@pytest.mark.parametrize(
    ("logits", "counts"),
    [
        ("last", [1, 1, 1]),
        ("all", [5, 3, 1]),
        (1, [1, 1, 1]),
        ([3, 0, 1], [3, 0, 1]),
        (torch.tensor([2, 3, 0]), [2, 3, 0]),
    ],
)
def test_logits_of_the_last_tokens_of_each_row_are_those_of_a_full_forward(
    tmp_path: Path, logits: Any, counts: list[int]
) -> None:
    folder = save_model(tmp_path, "llama")
    sequences = [[5, 9, 3, 17, 8], [4, 4, 6], [7]]

    class Running:
        def __init__(self, target: Any) -> None:
            self.model = target.model(str(folder))

        @hookimpl
        def plan_memory(self, budget: Any) -> list[MemoryRegion]:
            return self.model.regions()

        @hookimpl
        def warmup(self, resources: Any) -> None:
            self.tables = []
            for block in range(3):
                self.tables.append(BlockTable(resources.block_size))
                self.tables[-1].extend([block])
            rows = [ForwardRow(ids, 0, table) for ids, table in zip(sequences, self.tables, strict=True)]
            self.logits = self.model.forward(rows, logits=logits)
            for wrong, message in (
                (2, "logits=2 for row 2, which has 1 tokens"),
                ([1, 1], "logits has 2 entries for 3 rows"),
                ([1, -1, 1], "logits=-1 for row 1"),
                ([1, 1.0, 1], "logits=1.0 for row 1"),
                (True, "logits=True: expected"),
                ("first", "logits='first': expected 'last', 'all'"),
            ):
                with pytest.raises(PluginError, match=message):
                    self.model.forward(rows, logits=wrong)

        @hookimpl
        def propose(self, batch: Any) -> Any: ...

    made: list[Running] = []

    def make(config: Any, target: Any) -> Running:
        made.append(Running(target))
        return made[0]

    LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", check_parity=False, **provide(make)).close()
    model = load_reference(folder)
    with torch.no_grad():
        full = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences]
    expected = torch.cat([rows[len(rows) - count :] for rows, count in zip(full, counts, strict=True)])
    assert made[0].logits.shape == expected.shape
    torch.testing.assert_close(made[0].logits, expected, atol=3e-4, rtol=1e-3)
