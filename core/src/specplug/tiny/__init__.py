"""The embedded `tiny` model: 5.5 million parameters, trained on Python's standard library. It runs everything offline."""

from __future__ import annotations

import difflib
import functools
import logging
from pathlib import Path

from specplug.errors import CheckpointError

NAME = "tiny"
_NEAR = 0.75
logger = logging.getLogger("specplug")


def resolve_model(model: str) -> str:
    """The folder of the embedded model for the name `tiny`; any other name as it is.

    A folder `tiny` in the working directory goes before the embedded model, with a warning.

    Raises:
        CheckpointError: it is `tiny` mistyped, or hidden by a folder that is no checkpoint.
    """
    if Path(model).is_dir():
        if model == NAME:
            _tell_what_hides_it(Path(model).absolute())
        return model
    if model == NAME:
        return str(Path(__file__).parent)
    if difflib.SequenceMatcher(None, model.lower(), NAME).ratio() >= _NEAR:
        raise CheckpointError(f"there is no model '{model}'; did you mean '{NAME}', the embedded one?")
    return model


@functools.cache
def _tell_what_hides_it(folder: Path) -> None:
    """Once for a folder."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"the folder {folder} hides the embedded model '{NAME}', and is no checkpoint (it has no config.json); rename it, "
            "or run from another directory"
        )
    logger.warning(
        "'%s' is the folder %s here, which hides the embedded model; write ./%s if you mean it", NAME, folder, NAME
    )
