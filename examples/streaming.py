"""Streaming: text arrives in the pieces that each step commits.

python examples/streaming.py [MODEL]
"""

from __future__ import annotations

import sys

from specplug import LLM, SamplingParams


def main(model: str = "tiny") -> None:
    """Streams one seeded completion and marks the drafted tokens with brackets."""
    draft = {"method": "draft_model", "model": "tiny"}
    with LLM(model, speculative_config=draft) as llm:
        for piece in llm.stream("class Stack:\n", SamplingParams(temperature=0.8, seed=1, max_tokens=40)):
            for text, source in zip(piece.token_texts, piece.sources, strict=True):
                print(f"[{text}]" if source else text, end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:2])
