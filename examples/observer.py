"""An observer: counts, per method, how many nodes were drafted and accepted, without taking part.

python examples/observer.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from typing import Any

from specplug import LLM, SamplingParams, hookimpl


class AcceptanceCounter:
    """Wraps `verify`. It sees every call and returns its result unchanged."""

    def __init__(self) -> None:
        self.drafted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()

    @hookimpl(wrapper=True)
    def verify(self, batch: Any, proposal: Any, target: Any) -> Generator[None, Any, Any]:
        """Counts one step."""
        verdict = yield
        for row, tokens, path in zip(batch.rows, proposal.tokens, verdict.accepted, strict=True):
            if row.method is not None:
                self.drafted[row.method] += len(tokens)
                self.accepted[row.method] += len(path)
        return verdict


def main() -> None:
    """Observes a run of the draft-model speculator."""
    counter = AcceptanceCounter()
    draft = {"method": "draft_model", "model": "tiny", "num_speculative_tokens": 3}
    with LLM("tiny", speculative_config=draft, plugins={"counter": counter}) as llm:
        llm.generate(["import os\n", "def main():\n"], SamplingParams(temperature=0, max_tokens=32))
    for method, drafted in counter.drafted.items():
        print(f"{method}: {counter.accepted[method]} of {drafted} draft tokens accepted")


if __name__ == "__main__":
    main()
