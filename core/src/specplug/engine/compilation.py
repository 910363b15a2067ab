"""Which forwards of an engine are compiled."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from specplug.model.compile.artifacts import CompileError
from specplug.model.compile.forwards import capture_forward, compile_forward
from specplug.model.runner import ModelRunner

logger = logging.getLogger("specplug")
_SMALLEST_BYTES = 32 << 20  # a first compilation takes half a minute: a model that runs in milliseconds goes without


def wants_compilation(choice: bool | str, weight_bytes: int) -> bool:
    """What `compile` means for a target of so many bytes; its drafts go with it."""
    return weight_bytes >= _SMALLEST_BYTES if choice == "auto" else bool(choice)


def compile_forwards(runners: Sequence[ModelRunner], most_tokens: int) -> None:
    """Compiles each runner's forward, captures it where it runs on a GPU, and checks it against the model's own.

    Where one cannot be compiled or captured or computes something else, a warning of one line says so, and it runs as it is.

    Args:
        runners: the target's and the drafts'.
        most_tokens: of a batch in which every row decodes or verifies.
    """
    for runner in runners:
        try:
            runner.compiled = compile_forward(runner)
        except CompileError as error:
            logger.warning("%s runs uncompiled: %s", runner.architecture.name, error)
        if runner.device.type == "cuda" and runner.attends_natively:
            try:
                capture_forward(runner, most_tokens)
            except CompileError as error:
                logger.warning("%s runs without CUDA graphs: %s", runner.architecture.name, error)
