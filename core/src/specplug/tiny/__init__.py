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

    A folder `tiny` in the working directory takes precedence over the embedded model, with a warning.

    Raises:
        CheckpointError: the name is `tiny` mistyped, or a folder `tiny` is not a checkpoint.
    """
    if Path(model).is_dir():
        if model == NAME:
            _warn_of_folder(Path(model).absolute())
        return model
    if model == NAME:
        return str(Path(__file__).parent)
    if difflib.SequenceMatcher(None, model.lower(), NAME).ratio() >= _NEAR:
        raise CheckpointError(f"there is no model '{model}'; did you mean '{NAME}', the embedded one?")
    return model


@functools.cache
def _warn_of_folder(folder: Path) -> None:
    """Warns once for each folder."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"the folder {folder} hides the embedded model '{NAME}', and is not a checkpoint (it has no config.json); "
            "rename it, or run from another directory"
        )
    logger.warning(
        "'%s' is the folder %s here, which hides the embedded model; write ./%s if you mean it", NAME, folder, NAME
    )
