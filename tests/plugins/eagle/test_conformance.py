"""The conformance kit on dynamic trees: nodes are chosen by the head's scores, at any temperature alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from specplug.testing import SpeculatorConformance
from support.heads import TREES, save_eagle3


@pytest.mark.slow
class TestDynamicTree(SpeculatorConformance):
    quick = True
    architectures = ("llama",)
    deterministic = True
    samples = False
    proposes_trees = True
    owns_kv = True
    reads_states = True
    drafts = True

    def speculative_config(self, target_folder: Path) -> Mapping[str, Any]:
        vocabulary = json.loads((target_folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        head = save_eagle3(target_folder / "dynamic-head", vocabulary=vocabulary, norm_before_residual=True)
        return {"method": "eagle3", "model": str(head), **TREES["dynamic"]}
