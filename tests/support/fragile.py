"""A speculator for tests of engines in other processes: it makes steps slow, and one prompt ends an engine with `strict`."""

from __future__ import annotations

import time
from typing import Any

from specplug import Proposal, SpeculatorTraits, hookimpl

POISON = [7, 7, 7, 11, 7]
"""The ids of a prompt that makes it fail."""


class Fragile:
    """Drafts nothing; each step takes `delay` seconds longer."""

    traits = SpeculatorTraits(token_only=True)

    def __init__(self, delay: float) -> None:
        self._delay = delay

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        time.sleep(self._delay)
        if any(list(row.tokens[: len(POISON)]) == POISON for row in batch.rows):
            raise RuntimeError("the device is gone")
        return Proposal([[] for _ in batch.rows])


@hookimpl
def load_speculator(config: Any, target: Any) -> Fragile:
    """Reads `delay` of the configuration."""
    return Fragile(config.get("delay", 0.0))
