"""Which forwards of an engine are compiled."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from specplug.model.compiled import CompileError, compile_forward, measure_change
from specplug.model.probe import TOLERANCE
from specplug.model.runner import ModelRunner

logger = logging.getLogger("specplug")
_SMALLEST_BYTES = 32 << 20  # a first compilation takes half a minute: a model that runs in milliseconds goes without


def wants_compilation(choice: bool | str, weight_bytes: int) -> bool:
    """What `compile` means for a target of so many bytes; its drafts go with it."""
    return weight_bytes >= _SMALLEST_BYTES if choice == "auto" else bool(choice)


def compile_forwards(runners: Sequence[ModelRunner], block_size: int) -> None:
    """Compiles each runner's forward and checks it against the model's own.

    Where one cannot be compiled or computes something else, a warning of one line says so, and it runs as it is.
    """
    for runner in runners:
        try:
            runner.compiled = compile_forward(runner)
            change = measure_change(runner, block_size)
            limit = TOLERANCE[runner.cache.keys[0].dtype]
            if not change <= limit:
                raise CompileError(f"compiled, it gives other logits (relative difference {change:.2g})")
        except CompileError as error:
            runner.compiled = None
            logger.warning("%s runs uncompiled: %s", runner.architecture.name, error)
