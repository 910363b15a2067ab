"""The conformance kit: every promise of the contract, checked on a speculator of your own.

    from specplug.testing import SpeculatorConformance

    class TestMine(SpeculatorConformance):
        def speculative_config(self, target_folder):
            return {"method": "mine", "num_speculative_tokens": 4}

The same checks run from the command line: `specplug check mine`. The names are imported when they are first used: only
`SpeculatorConformance` needs pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specplug.testing.check import Check
    from specplug.testing.checks import CHECKS
    from specplug.testing.conformance import SpeculatorConformance
    from specplug.testing.failures import CheckFailure, NotApplicable
    from specplug.testing.models import save_tiny_model, tiny_draft
    from specplug.testing.runner import CheckResult, run_check, run_checks
    from specplug.testing.subject import Flags, Subject
    from specplug.testing.targets import Targets

_HOMES = {
    "check": ("Check",),
    "checks": ("CHECKS",),
    "conformance": ("SpeculatorConformance",),
    "failures": ("CheckFailure", "NotApplicable"),
    "models": ("save_tiny_model", "tiny_draft"),
    "runner": ("CheckResult", "run_check", "run_checks"),
    "subject": ("Flags", "Subject"),
    "targets": ("Targets",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CHECKS",
    "Check",
    "CheckFailure",
    "CheckResult",
    "Flags",
    "NotApplicable",
    "SpeculatorConformance",
    "Subject",
    "Targets",
    "run_check",
    "run_checks",
    "save_tiny_model",
    "tiny_draft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'specplug.testing' has no attribute '{name}'")
    return getattr(importlib.import_module(f"specplug.testing.{_HOME_OF[name]}"), name)
