"""The embedded `tiny` model: 5.5 million parameters, trained on Python's standard library. It runs everything offline."""

from __future__ import annotations

from pathlib import Path

NAME = "tiny"


def resolve_model(model: str) -> str:
    """The folder of the embedded model for the name `tiny`; any other name as it is."""
    return str(Path(__file__).parent) if model == NAME and not Path(model).is_dir() else model
