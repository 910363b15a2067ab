"""An engine that several files use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from specplug import LLM, SamplingParams
from specplug.testing.models import save_words
from support.models import VOCABULARY, save_model
from support.speculators import Oracle, TokenSpeculator, provide

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(save_model(tmp_path_factory.mktemp("model"), "llama"), VOCABULARY)


@pytest.fixture(scope="module")
def words(folder: Path) -> Iterator[LLM]:
    """An engine whose text is `w3. w4.`, with drafts that are sometimes right."""
    known: list[list[int]] = []
    with LLM(
        folder, memory="32MiB", strict=True, **provide(lambda c, t: TokenSpeculator(Oracle(known, VOCABULARY, 0.9)))
    ) as llm:
        prompts = [[3, 4], [5], [6, 7, 8], [9, 10, 11, 12]]
        known += [out.prompt_token_ids + out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY)]
        yield llm
