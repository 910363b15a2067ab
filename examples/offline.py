"""Offline generation: several prompts in one batch, with the n-gram speculator.

python examples/offline.py [MODEL]
"""

from __future__ import annotations

import sys

from specplug import LLM, SamplingParams

PROMPTS = ["x = [0, 1, 0, 1,", "def read(path):\n", "import os\n"]
NGRAM = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 1}


def main(model: str = "tiny") -> None:
    """Generates greedily and prints the acceptance length of each output."""
    with LLM(model, speculative_config=NGRAM) as llm:
        for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32)):
            completion = output.outputs[0]
            print(repr(completion.text), "acceptance length:", completion.metrics.mean_acceptance_length)


if __name__ == "__main__":
    main(*sys.argv[1:2])
