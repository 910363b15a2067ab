"""The installed plugin in an engine with the embedded model."""

from __future__ import annotations

import pytest

from specplug import LLM, SamplingParams

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
GREEDY = SamplingParams(temperature=0, max_tokens=96)


@pytest.mark.parametrize("lookup", [{}, {"prompt_lookup_max": 4, "prompt_lookup_min": 1}], ids=["default", "1 to 4"])
def test_output_is_that_of_plain_decoding_and_drafts_are_accepted(lookup: dict[str, int]) -> None:
    with LLM("tiny", dtype="float32") as plain:
        expected = [output.outputs[0].token_ids for output in plain.generate(PROMPTS, GREEDY)]
    config = {"method": "ngram", "num_speculative_tokens": 5, **lookup}
    with LLM("tiny", dtype="float32", strict=True, speculative_config=config) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        stats = llm.engine.stats
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert (stats.mean_acceptance_length or 0) > 1
    assert stats.num_steps < sum(map(len, expected))
    assert "ngram" in outputs[0].outputs[0].token_sources
