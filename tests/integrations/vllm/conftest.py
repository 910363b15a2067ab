"""What the tests of specplug-vllm share. They are skipped where vLLM is not installed; CONTRIBUTING.md says how to run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.fixture
def repaired_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, vLLM 0.32 drops what its `expand_kernel` computes: temperatures of draft tokens are uninitialised memory.

    So sampled output is wrong with every method of speculation, vLLM's own too (docs/vllm.md). This computes them.
    """
    from vllm.v1.sample import rejection_sampler

    def expanded(values: Any, ends: Any, count: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        return torch.where(values == replace_from, replace_to, values).repeat_interleave(counts, output_size=count)

    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", expanded)
