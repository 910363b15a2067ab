"""`specplug.host`: speculators in an engine that is not specplug's. See docs/hosts.md.

`SpeculatorHost` finds and loads speculators by configuration and asks them for drafts; its rows stand for the engine's
sequences. specplug's own engine is made of the same pieces: the chain of speculators, the checks of proposals, the loading.
Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from specplug import threads

if TYPE_CHECKING:
    from specplug.config.speculative import parse_speculative_config
    from specplug.host.host import SpeculatorHost
    from specplug.host.limits import HostLimits
    from specplug.host.rows import HostRow
    from specplug.host.tokens import ArrayTokens
    from specplug.plugins.target import TargetFacade
    from specplug.speculation.deadline import NotReturnedError
    from specplug.speculation.draft import Draft
    from specplug.speculation.validation import check_proposal

_HOMES = {
    "ArrayTokens": "specplug.host.tokens",
    "Draft": "specplug.speculation.draft",
    "HostLimits": "specplug.host.limits",
    "HostRow": "specplug.host.rows",
    "NotReturnedError": "specplug.speculation.deadline",
    "SpeculatorHost": "specplug.host.host",
    "TargetFacade": "specplug.plugins.target",
    "check_proposal": "specplug.speculation.validation",
    "parse_speculative_config": "specplug.config.speculative",
}

__all__ = [
    "ArrayTokens",
    "Draft",
    "HostLimits",
    "HostRow",
    "NotReturnedError",
    "SpeculatorHost",
    "TargetFacade",
    "check_proposal",
    "parse_speculative_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specplug.host' has no attribute '{name}'")
    with threads.importing():
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
