"""Compiles the forwards of several models: the target's and the drafts'."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from specplug.model.compile.artifacts import CompileError
from specplug.model.compile.forwards import capture_forward, compile_adapted_forward, compile_forward
from specplug.model.runner import ModelRunner

logger = logging.getLogger("specplug")
_SMALLEST_BYTES = 32 << 20  # the first compilation takes half a minute, too long for a model that runs in milliseconds


def wants_compilation(choice: bool | str, weight_bytes: int) -> bool:
    """Whether to compile a target of this size, and with it its drafts."""
    return weight_bytes >= _SMALLEST_BYTES if choice == "auto" else bool(choice)


def compile_forwards(runners: Sequence[ModelRunner], most_tokens: int, most_logits: int) -> None:
    """Compiles each runner's forward, captures it on a GPU, and compares it with the model's own forward.

    A forward that cannot be compiled or captured, or that computes something else, runs uncompiled, with a one-line warning.
    That of a model with recurrent state is compiled where kernels run all its layers, and never with adapters: without kernels,
    what a step does depends on where each row's state is. Nor is that of a model which branches on the values of tensors.

    Args:
        runners: the target's and the drafts'.
        most_tokens: of a batch that is captured on a GPU.
        most_logits: of a batch.
    """
    for runner in runners:
        if runner.architecture.reads_values:
            logger.info("%s runs uncompiled: it branches on the values of tensors", runner.architecture.name)
            continue
        if runner.states is not None and not runner.states.has_all_kernels:
            logger.info("%s runs uncompiled: its layers have recurrent state", runner.architecture.name)
            continue
        try:
            runner.compiled = compile_forward(runner)
        except CompileError as error:
            logger.warning("%s runs uncompiled: %s", runner.architecture.name, error)
        if runner.states is not None:
            continue
        if runner.adapters is not None and runner.compiled is not None and runner.device.type == "cpu":
            try:
                runner.compiled_adapted = compile_adapted_forward(runner, runner.adapters)
            except CompileError as error:
                logger.warning("%s runs uncompiled where rows have adapters: %s", runner.architecture.name, error)
        if runner.device.type == "cuda" and runner.attends_natively:
            try:
                capture_forward(runner, most_tokens, most_logits)
            except CompileError as error:
                logger.warning("%s runs without CUDA graphs: %s", runner.architecture.name, error)
