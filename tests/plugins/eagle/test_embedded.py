"""The embedded head is whole, small, and drafts as well as it was trained to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import specplug_eagle
from specplug import LLM, SamplingParams

PROMPTS = (
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\nimport sys\n\n\ndef main(argv=None):\n    parser = argparse.ArgumentParser()\n",
    "# Before:\ndef area(self, width):\n    return width * width\n# After renaming width to side:\n",
    "def read_lines(path, encoding):\n    with open(path, encoding=encoding) as stream:\n",
)


def test_the_package_data_is_small() -> None:
    folder = Path(specplug_eagle.__file__).parent / "tiny"
    assert {"config.json", "model.safetensors", "training.json"} <= {path.name for path in folder.iterdir()}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3_000_000


SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "strict": True,
    "memory": "512MiB",
    "max_num_seqs": 4,
    "max_model_len": 512,
}
PARAMS = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with LLM("tiny", **SETTINGS) as plain:
        return [output.outputs[0].token_ids for output in plain.generate(list(PROMPTS), PARAMS, use_tqdm=False)]


@pytest.mark.parametrize(
    ("options", "floor"),
    [
        ({"num_speculative_tokens": 4}, 2.4),
        ({"speculative_token_tree": "eagle"}, 2.8),
        ({"tree_depth": 4, "tree_top_k": 6, "tree_total_tokens": 30}, 3.0),
    ],
)
def test_acceptance_stays_what_it_was(expected: list[list[int]], options: dict[str, object], floor: float) -> None:
    with LLM(
        "tiny", speculative_config={"method": "eagle3", "num_speculative_tokens": 4, **options}, **SETTINGS
    ) as llm:
        outputs = llm.generate(list(PROMPTS), PARAMS, use_tqdm=False)
        stats = llm.engine.stats
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert 1 + stats.num_accepted_draft_tokens / stats.num_spec_steps >= floor
