"""The plan is what is allocated; blocks are used to the last; what does not fit is refused with the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, MemoryRegion, Proposal, SamplingParams, hookimpl
from specplug.config.engine import EngineConfig, parse_bytes
from specplug.engine.planning import plan_engine
from specplug.errors import ConfigurationError, InsufficientMemoryError, RequestError
from support.marks import slow_except
from support.models import ARCHITECTURES, BRANCHING, VOCABULARY, save_model
from support.peak import tensor_bytes
from support.speculators import ModelSpeculator, Oracle, TreeSpeculator, provide


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama", hidden_size=64, vocab_size=512)


class Buffers(ModelSpeculator):
    """A model speculator that also keeps a buffer of its own."""

    @hookimpl
    def plan_memory(self, budget: Any) -> list[MemoryRegion]:
        buffer = MemoryRegion("table", "buffers", fixed_bytes=1_000_000)
        return [*self.model.regions(scratch_tokens_per_row=self.gamma), buffer]

    @hookimpl
    def warmup(self, resources: Any) -> None:
        self.table = torch.zeros(1_000_000, dtype=torch.uint8, device=resources.device)


@pytest.mark.parametrize("architecture", slow_except((*ARCHITECTURES, *BRANCHING), "llama", "gpt_oss", "longcat_flash"))
def test_weights_are_planned_exactly(tmp_path: Path, architecture: str) -> None:
    folder = save_model(tmp_path / architecture, architecture)
    for dtype in ("float32", "bfloat16"):
        before = tensor_bytes()
        with LLM(folder, skip_tokenizer_init=True, dtype=dtype, memory="8MiB", check_parity=False) as llm:
            plan = llm.engine.plan
            used = tensor_bytes() - before
            assert used == pytest.approx(plan.total_bytes - plan.step_bytes, rel=0.02)
            assert llm.engine.runner.cache.num_bytes == plan.target_kv
            assert plan.total_bytes <= plan.budget_bytes


@pytest.mark.parametrize("kind", ["model", "tree"])
def test_planned_and_allocated_differ_by_less_than_two_percent(folder: Path, kind: str) -> None:
    def make(config: Any, target: Any) -> Any:
        if kind == "model":
            return Buffers(target, folder, 4)
        return TreeSpeculator(Oracle([], VOCABULARY), (0, 1, 2, 3, "final"), 9, top_k=3)

    before = tensor_bytes()
    llm = LLM(folder, skip_tokenizer_init=True, memory="40MiB", **provide(make))
    plan = llm.engine.plan
    used = tensor_bytes() - before
    assert used == pytest.approx(plan.total_bytes - plan.step_bytes, rel=0.02)
    llm.generate([[3, 4, 5]] * 4, SamplingParams(temperature=0, max_tokens=20))
    assert tensor_bytes() - before == pytest.approx(plan.total_bytes - plan.step_bytes, rel=0.03), (
        "something is left behind after requests"
    )
    llm.close()
    del llm
    assert tensor_bytes() - before < plan.total_bytes * 0.01, "something is left behind after close"


def test_every_block_can_be_filled(folder: Path) -> None:
    """Rows that together need every token of the cache run to their end."""
    with LLM(folder, skip_tokenizer_init=True, max_model_len=96, max_num_seqs=3, block_size=4, memory="40MiB") as llm:
        allocator = llm.engine.scheduler.allocator
        prompts = [[3] * 40, [4] * 50, [5] * 60, [6] * 95]
        params = [SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)] * 4
        outputs = llm.generate(prompts, params)
        assert [len(o.prompt_token_ids) + len(o.outputs[0].token_ids) for o in outputs] == [96] * 4
        assert {o.outputs[0].finish_reason for o in outputs} == {"length"}
        assert allocator.num_free == allocator.num_blocks


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(folder: Path) -> None:
    with LLM(folder, skip_tokenizer_init=True, max_model_len=32, memory="40MiB") as llm:
        with pytest.raises(RequestError, match="40 tokens, the longest sequence is 32"):
            llm.generate([[3, 4], [3] * 40])
        assert not llm.engine.has_unfinished_requests, "none of the prompts is run"
        assert llm.generate([[3, 4]], SamplingParams(max_tokens=2))[0].finished


@pytest.mark.parametrize(
    ("options", "length", "advice"),
    [
        ({"max_model_len": 32}, 100, "shorten it, or start with a larger max_model_len$"),
        ({"memory": 600_000}, 100, r"shorten it, or start with more memory \(the KV cache holds \d+ tokens\)$"),
        ({}, 160, "shorten it: the model has positions for 160 tokens$"),
        ({"max_model_len": 32}, 160, "shorten it: the model has positions for 160 tokens$"),
        ({"memory": 600_000}, 160, "shorten it: the model has positions for 160 tokens$"),
    ],
)
def test_what_is_advised_for_a_longer_prompt_works(
    folder: Path, options: dict[str, Any], length: int, advice: str
) -> None:
    options = {"memory": "40MiB", "block_size": 4, **options}
    with LLM(folder, skip_tokenizer_init=True, **options) as llm, pytest.raises(RequestError, match=advice):
        llm.generate([[3] * length])


def test_a_model_with_longrope_says_why_it_takes_no_longer_prompt(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope["original_max_position_embeddings"] = 64
    folder = save_model(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=64)
    text = "shorten it: beyond 64 tokens its longrope RoPE"
    with LLM(folder, skip_tokenizer_init=True, memory="40MiB") as llm, pytest.raises(RequestError, match=text):
        llm.generate([[3] * 100])


@pytest.mark.parametrize(("prompt", "text"), [([], "empty"), ([3, 512], "outside the vocabulary"), ([-1], "outside")])
def test_bad_prompts(folder: Path, prompt: list[int], text: str) -> None:
    with LLM(folder, skip_tokenizer_init=True, memory="40MiB") as llm, pytest.raises(RequestError, match=text):
        llm.generate([prompt] if prompt else {"prompt_token_ids": []})


def test_too_little_memory_names_the_parts(folder: Path) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"target weights .* KV cache .* the budget is 450\.0 KiB"):
        LLM(folder, skip_tokenizer_init=True, memory="450KiB", max_model_len=100)


def test_the_length_shrinks_to_what_fits_unless_it_was_asked_for(folder: Path) -> None:
    plan = plan_engine(EngineConfig.create(str(folder))).plan
    tight = plan.target_weights + plan.buffers + 32 * 1024
    plan = plan_engine(EngineConfig.create(str(folder), memory=tight, block_size=4)).plan
    assert 4 < plan.max_model_len < 160
    assert plan.total_bytes <= tight
    with pytest.raises(InsufficientMemoryError, match=f"at most {plan.max_model_len} fit"):
        plan_engine(EngineConfig.create(str(folder), memory=tight, block_size=4, max_model_len=160))


def test_a_draft_that_does_not_fit_is_refused_before_its_weights_are_read(folder: Path, tmp_path: Path) -> None:
    big = save_model(tmp_path / "big", "llama", hidden_size=256, intermediate_size=2048)

    class Never(ModelSpeculator):
        def __init__(self, target: Any) -> None:
            super().__init__(target, big, 4)
            self.model.materialize = lambda progress: pytest.fail("weights were read")

        @hookimpl
        def propose(self, batch: Any) -> Any:
            return Proposal([[] for _ in batch.rows])

    with pytest.raises(InsufficientMemoryError, match="draft weights"):
        LLM(folder, skip_tokenizer_init=True, memory="4MiB", max_model_len=64, **provide(lambda c, t: Never(t)))


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("1.5 KB", 1500), (1000, 1000), ("64m", 64_000_000), ("12", 12), ("2MiB", 2 << 20)],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", -5, "8 parsecs", True])
def test_bad_sizes(text: Any) -> None:
    with pytest.raises(ConfigurationError, match="memory="):
        parse_bytes(text)
