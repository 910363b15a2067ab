"""The embedded `tiny` model: 5.5 million parameters, trained on Python's standard library. It runs everything offline."""

from __future__ import annotations

import difflib
from pathlib import Path

from specplug.errors import CheckpointError

NAME = "tiny"
_NEAR = 0.75


def resolve_model(model: str) -> str:
    """The folder of the embedded model for the name `tiny`; any other name as it is.

    Raises:
        CheckpointError: it is `tiny` mistyped.
    """
    if Path(model).is_dir():
        return model
    if model == NAME:
        return str(Path(__file__).parent)
    if difflib.SequenceMatcher(None, model.lower(), NAME).ratio() >= _NEAR:
        raise CheckpointError(f"there is no model '{model}'; did you mean '{NAME}', the embedded one?")
    return model
