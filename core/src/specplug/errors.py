"""Every error a user can cause. Each message says what is wrong, where, and how to mend it, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class SpecplugError(Exception):
    """Base of all errors that specplug raises on purpose."""


class ConfigurationError(SpecplugError):
    """A setting, or a combination of settings, that cannot work."""


class CheckpointError(SpecplugError):
    """A checkpoint that is missing, damaged, or not in a format that is loaded."""


class UnsupportedModelError(SpecplugError):
    """A model that cannot be run with a paged KV cache through the attention interface."""


class InsufficientMemoryError(SpecplugError):
    """The memory plan does not fit the budget."""


class PluginError(SpecplugError):
    """A plugin that is missing, broken, or breaks the contract."""


class RequestError(SpecplugError):
    """A request that can never be served."""


class ModelOutputError(SpecplugError):
    """The model computed something no token can be chosen from."""


class GenerationError(SpecplugError):
    """Some requests of a call failed, each for a reason of its own; all others were served.

    Attributes:
        outputs: the `RequestOutput`s of all prompts of the call, in their order. Failed completions have the `finish_reason`
            `error`, their message in `error`, and the tokens generated before.
    """

    def __init__(self, message: str, outputs: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.outputs: list[Any] = list(outputs)  # of RequestOutput, whose module imports this one


class DeadlineExceededError(GenerationError):
    """A request did not end within its timeout; `outputs` holds what was generated."""


class QueueFullError(SpecplugError):
    """More requests are waiting than the queue may hold; the same request may be served later."""


class EngineDeadError(SpecplugError):
    """The engine stopped after an error that concerns no single request, and serves no more."""


class StartupError(SpecplugError):
    """The engine could not start; the message names the step that failed."""


def one_line(error: BaseException, most: int = 120) -> str:
    """Returns an error's type and first sentence in at most `most` characters: what others raise can run over many lines."""
    text = " ".join(str(error).split()).split(". ")[0]
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
