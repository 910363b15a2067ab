"""The shipped speculators keep the contract, by the kit that third parties use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from specplug.testing import SpeculatorConformance, tiny_draft
from support.heads import TREES, save_eagle3


class TestNgram(SpeculatorConformance):
    quick = True
    architectures = ("llama", "gemma2", "lfm2")
    deterministic = True
    samples = False
    drafts = True

    def speculative_config(self, target_folder: Path) -> Mapping[str, Any]:
        return {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.mark.slow
class TestDraftModel(SpeculatorConformance):
    quick = True
    architectures = ("qwen3", "lfm2")
    deterministic = True
    samples = True
    owns_kv = True
    drafts = True

    def speculative_config(self, target_folder: Path) -> Mapping[str, Any]:
        return {"method": "draft_model", "model": str(tiny_draft(target_folder)), "num_speculative_tokens": 4}

    def perfect_config(self, target_folder: Path) -> Mapping[str, Any]:
        return {"method": "draft_model", "model": str(target_folder), "num_speculative_tokens": 4}


class Eagle3(SpeculatorConformance):
    quick = True
    architectures = ("llama",)
    deterministic = True
    owns_kv = True
    reads_states = True
    drafts = True
    keys: ClassVar[Mapping[str, Any]] = {}

    def speculative_config(self, target_folder: Path) -> Mapping[str, Any]:
        vocabulary = json.loads((target_folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        head = save_eagle3(target_folder / "draft-head", vocabulary=vocabulary, norm_before_residual=True)
        return {"method": "eagle3", "model": str(head), "num_speculative_tokens": 4, **self.keys}


@pytest.mark.slow
class TestEagle3Sampled(Eagle3):
    samples = True
    keys: ClassVar[Mapping[str, Any]] = {**TREES["odd"], "draft_sample_method": "probabilistic"}
    proposes_trees = True
