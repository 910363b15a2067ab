"""Every promise of the contract, on tiny random targets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from specplug.testing import SpeculatorConformance
from specplug_suffix import load_speculator


class TestSuffix(SpeculatorConformance):
    quick = True
    plugins: ClassVar[Mapping[str, Any]] = {"suffix": load_speculator}
    samples = False
    proposes_trees = True
    owns_kv = False
    reads_states = False
    drafts = True

    def speculative_config(self, target_folder: Path) -> Mapping[str, Any]:
        return {"method": "suffix", "num_speculative_tokens": 12}
