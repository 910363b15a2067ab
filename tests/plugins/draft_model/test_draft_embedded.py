"""The embedded pair: the draft that comes with the plugin, for the target that comes with core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import specplug_draft_model
from specplug import LLM, SamplingParams
from support.marks import slow_except

PACKAGE = Path(specplug_draft_model.__file__).parent
MEGABYTES = 2 * 1024 * 1024
PROMPTS = [
    "import os\nimport sys\n\n\nclass Point:\n    def __init__(self, x, y):\n",
    "def read_lines(path, encoding):\n    result = []\n    with open(path) as stream:\n        for line in",
    "    def test_one(self):\n        self.assertEqual(f(1), 1)\n        self.assertEqual(f(2), 2)\n        self",
    "class Shape:\n    def __init__(self, width, height):\n        self.width = width\n",
    "    if name in self.users:\n        raise ValueError(",
    "for key, value in sorted(mapping.items()):\n    if not isinstance(value, str):\n        raise",
]
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with LLM("tiny", dtype="float32") as plain:
        return [output.outputs[0].token_ids for output in plain.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize(
    "keys", [{}, pytest.param({"model": "tiny"}, marks=pytest.mark.slow)], ids=["no model", "model tiny"]
)
def test_its_drafts_are_worth_their_while_and_cost_no_token(expected: list[list[int]], keys: dict[str, str]) -> None:
    config = {"method": "draft_model", "num_speculative_tokens": 4, **keys}
    with LLM("tiny", dtype="float32", strict=True, speculative_config=config) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        stats = llm.engine.stats
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert stats.mean_acceptance_length is not None
    assert stats.mean_acceptance_length >= 2.6
    assert stats.num_steps < 0.45 * sum(map(len, expected))


@pytest.mark.parametrize("method", slow_except(["greedy", "probabilistic"], "probabilistic"))
def test_it_also_helps_at_temperature_one(method: str) -> None:
    config = {"method": "draft_model", "num_speculative_tokens": 4, "draft_sample_method": method}
    with LLM("tiny", dtype="float32", strict=True, speculative_config=config) as llm:
        llm.generate(PROMPTS * 4, SamplingParams(temperature=1.0, max_tokens=48, ignore_eos=True))
        assert (llm.engine.stats.mean_acceptance_length or 0) >= 1.7


def test_with_lookup_first_both_draft(expected: list[list[int]]) -> None:
    fallback = {"method": "draft_model", "num_speculative_tokens": 4}
    config = {"method": "ngram", "num_speculative_tokens": 4, "fallback": fallback}
    with LLM("tiny", dtype="float32", strict=True, speculative_config=config) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        by_method = llm.engine.stats.by_method
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert set(by_method) == {"ngram", "draft_model"}
    assert all(counts.num_accepted_draft_tokens > 0 for counts in by_method.values())


def test_the_package_stays_small() -> None:
    data = [file for file in (PACKAGE / "tiny").iterdir() if file.is_file()]
    assert {"config.json", "model.safetensors"} <= {file.name for file in data}
    assert sum(file.stat().st_size for file in data) <= MEGABYTES


def test_its_weights_are_finite_and_all_there() -> None:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(PACKAGE / "tiny", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
