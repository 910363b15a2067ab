"""The target states that heads read are Transformers' own, on every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, SamplingParams
from support.models import ARCHITECTURES, VOCABULARY, save_model
from support.reference import load_reference
from support.speculators import Oracle, TreeSpeculator, provide

BOUNDARIES = (0, 1, 2, 3, "final")


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_delivered_states_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    """Three layers: what enters each, what leaves the last before the final norm, and after it; through trees and chunks."""
    folder = save_model(tmp_path / architecture, architecture, eos_token_id=None)
    speculator = TreeSpeculator(Oracle([], VOCABULARY), BOUNDARIES, 7)
    options: dict[str, Any] = {"max_num_batched_tokens": 40, "block_size": 4, "memory": "32MiB", "check_parity": False}
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(folder, skip_tokenizer_init=True, strict=True, **options, **provide(lambda c, t: speculator)) as llm:
        last_layer = llm.engine.runner.architecture.layers[-1]
        llm.generate([list(range(3, 53)), [9, 8, 7]], params)
        llm.generate([[3]], SamplingParams(temperature=0, max_tokens=1))  # delivers `ended`
    assert len(speculator.histories) == 2
    model: Any = load_reference(folder)
    for tokens, channels in speculator.histories:
        leaving: list[Any] = []
        hook = model.get_submodule(last_layer).register_forward_hook(lambda m, a, out: leaving.append(out))  # noqa: B023
        with torch.no_grad():
            out = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        hook.remove()
        states = leaving[0] if isinstance(leaving[0], torch.Tensor) else leaving[0][0]
        expected = {boundary: out.hidden_states[boundary][0] for boundary in range(3)}
        expected |= {3: states.reshape(len(tokens), -1), "final": out.hidden_states[-1][0]}
        for boundary in BOUNDARIES:
            delivered = channels[boundary]
            assert sorted(delivered) == list(range(len(tokens) - 1))[: len(delivered)]
            assert len(delivered) > 3
            stacked = torch.stack([delivered[position] for position in sorted(delivered)]).cpu()
            torch.testing.assert_close(stacked, expected[boundary][: len(stacked)], atol=5e-4, rtol=1e-3)
