"""The plugin in an engine with the embedded model."""

from __future__ import annotations

from typing import Any

import pytest

import specplug_suffix
from specplug import LLM, SamplingParams
from specplug_suffix import SuffixSpeculator, load_speculator

_FUNCTION = '''def read_lines(path, encoding):
    """Read all lines of a file."""
    result = []
    with open(path, encoding=encoding) as stream:
        for line in stream:
            result.append(line.rstrip())
    return result
'''
PROMPTS = [
    f"# Before:\n{_FUNCTION}\n\n# After renaming path to name:\n",
    "import os\nimport sys\n\n\nclass Point:\n    def __init__(self, x, y):\n",
    "    def test_one(self):\n        self.assertEqual(f(1), 1)\n        self.assertEqual(f(2), 2)\n        self",
]
GREEDY = SamplingParams(temperature=0, max_tokens=64)


def engine(made: list[SuffixSpeculator], **options: Any) -> LLM:
    def load(config: Any, target: Any) -> SuffixSpeculator:
        made.append(load_speculator(config, target))
        return made[-1]

    method = {"method": "suffix", "num_speculative_tokens": options.pop("num_speculative_tokens", 12)}
    keys = {key: options.pop(key) for key in list(options) if key.startswith("suffix_")}
    return LLM(
        "tiny", dtype="float32", strict=True, plugins={"suffix": load}, speculative_config={**method, **keys}, **options
    )


def token_ids(outputs: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with LLM("tiny", dtype="float32") as plain:
        return token_ids(plain.generate(PROMPTS, GREEDY))


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_output_is_that_of_plain_decoding_and_earlier_outputs_speed_it_up(
    expected: list[list[int]], factor: float
) -> None:
    made: list[SuffixSpeculator] = []
    with engine(made, suffix_decoding_max_spec_factor=factor) as llm:
        steps = []
        for _ in range(3):
            before = llm.engine.stats.num_steps
            outputs = llm.generate(PROMPTS, GREEDY)
            steps.append(llm.engine.stats.num_steps - before)
            assert token_ids(outputs) == expected
        assert "suffix" in outputs[0].outputs[0].token_sources
    assert steps[1] < steps[0] < sum(map(len, expected))
    assert {tuple(text[:-1]) for text in made[0].finished.texts} == set(map(tuple, expected))
    assert not made[0].rows


def test_output_is_that_of_plain_decoding_with_prompts_in_pieces(expected: list[list[int]]) -> None:
    made: list[SuffixSpeculator] = []
    with engine(made, max_num_batched_tokens=40, max_num_seqs=2, max_model_len=256) as llm:
        assert token_ids(llm.generate(PROMPTS, GREEDY)) == expected
    assert {tuple(text[:-1]) for text in made[0].finished.texts} == set(map(tuple, expected))


def test_an_aborted_request_is_not_learnt(expected: list[list[int]]) -> None:
    made: list[SuffixSpeculator] = []
    with engine(made) as llm:
        for _ in zip(range(4), llm.stream(PROMPTS[0], GREEDY), strict=False):
            pass
        assert token_ids(llm.generate(PROMPTS[1:2], GREEDY)) == expected[1:2]
    assert [text[:-1] for text in made[0].finished.texts] == expected[1:2]
    assert not made[0].rows


def test_a_seeded_request_samples_the_same_tokens_whatever_was_learnt() -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=32)
    with engine([]) as llm:
        first, second = (token_ids(llm.generate(PROMPTS, params)) for _ in range(2))
        alone = token_ids(llm.generate(PROMPTS[1], params))
    assert first == second
    assert alone == first[1:2]


def test_the_number_of_draft_tokens_is_chosen_up_to_a_bound_of_its_own() -> None:
    with LLM("tiny", plugins={"suffix": specplug_suffix}, speculative_config={"method": "suffix"}, strict=True) as llm:
        (speculator,) = llm.engine.chain.speculators
        assert speculator.config.num_speculative_tokens == specplug_suffix.max_num_speculative_tokens == 16
        assert speculator.traits.max_nodes == 16
        assert speculator.traits.learns
