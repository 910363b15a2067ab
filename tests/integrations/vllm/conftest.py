"""What the tests of specplug-vllm share. They are skipped where vLLM is not installed; CONTRIBUTING.md says how to run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.vllm_engine import start


@pytest.fixture(scope="session")
def plain() -> Callable[..., list[list[int]]]:
    """vLLM's own output, without speculation; each is computed once."""
    known: dict[Any, list[list[int]]] = {}

    def outputs(prompts: list[str], max_tokens: int | list[int] = 48, **options: Any) -> list[list[int]]:
        key = (tuple(prompts), str(max_tokens), str(options))
        if key not in known:
            with start() as engine:
                known[key] = engine.greedy(prompts, max_tokens, **options)
        return known[key]

    return outputs


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Path:
    """This folder, from which plugins may be imported by name."""
    folder = Path(__file__).parent
    monkeypatch.syspath_prepend(str(folder))
    return folder
