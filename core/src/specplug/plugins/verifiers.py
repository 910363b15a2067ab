"""Which plugins bring a `verify` of their own, found without making their speculators."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

from specplug.contract.hookspecs import PROJECT


def own_verifiers(plugin: Any) -> tuple[str, ...]:
    """The classes that implement `verify`, and not only wrap it, in the imported modules of a plugin's package.

    What `load_speculator` returns is known only once there is a configuration and a target; an engine marks results by
    what was really loaded.
    """
    name = plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__module__
    module = sys.modules.get(name)
    package = getattr(module, "__package__", None) or name
    if package == PROJECT:  # core's own package, which holds the verifier that answers last
        package = name
    found = set()
    for each, part in list(sys.modules.items()):
        if part is not None and (each == package or each.startswith(f"{package}.")):
            for value in list(vars(part).values()):
                if inspect.isclass(value) and value.__module__ == each and _implements_verify(value):
                    found.add(f"{each}.{value.__qualname__}")
    return tuple(sorted(found))


def _implements_verify(cls: type) -> bool:
    for name in dir(cls):
        options = getattr(inspect.getattr_static(cls, name, None), f"{PROJECT}_impl", None)
        if isinstance(options, dict) and (options.get("specname") or name) == "verify" and not options.get("wrapper"):
            return True
    return False
