"""Imports plugins and reports each result: the child process of `specplug list --check`, which a plugin may end.

python -m specplug.cli.run.plugin_import '["observer good-package name", …]'
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from typing import Any


def main() -> None:
    """Writes one JSON line per plugin to standard output; the output of plugins is redirected to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8", closefd=True) as answers:
        os.dup2(2, 1)
        logging.getLogger("specplug").setLevel(logging.CRITICAL)  # the answers contain the failures
        from specplug.plugins.finder import PluginRecord
        from specplug.plugins.registry import PluginRegistry

        registry = PluginRegistry(allowed=())
        answers.write("ready\n")
        answers.flush()
        for fields in json.loads(sys.argv[1]):
            answer = _judge(registry, PluginRecord(**fields))
            sys.stdout.flush()
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _judge(registry: Any, record: Any) -> dict[str, Any]:
    from specplug.plugins.implementations import own_verifiers
    from specplug.plugins.registry import first_line

    registry.failures.pop(record.method, None)
    module = registry.load(record)
    if module is None:
        error = registry.failures[record.method]
        trace = "".join(traceback.format_exception(error))
        return {"reason": first_line(error), "traceback": trace}
    hooks: list[str] = []
    wraps: list[str] = []
    for caller in registry.manager.get_hookcallers(module) or []:
        own = [implementation for implementation in caller.get_hookimpls() if implementation.plugin is module]
        (wraps if all(implementation.wrapper for implementation in own) else hooks).append(caller.name)
    reason = ""
    if record.kind == "speculator" and "load_speculator" not in hooks:
        reason = "its module has no load_speculator; an observer belongs in the group specplug.observers"
    if record.kind == "observer" and hooks:
        reason = f"its module implements {', '.join(hooks)}; an observer may only have wrappers"
    return {
        "reason": reason,
        "hooks": sorted(hooks),
        "wraps": sorted(wraps),
        "verifiers": own_verifiers(module),
    }


if __name__ == "__main__":
    main()
