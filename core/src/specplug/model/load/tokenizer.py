"""The tokenizer that a checkpoint's folder or GGUF file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specplug.errors import CheckpointError, one_line
from specplug.model.load.gguf_header import is_gguf
from specplug.model.load.gguf_loading import has_tokenizer, reading_gguf, source_options
from specplug.model.load.library_output import quiet_transformers

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
_ADVICE = "name one with tokenizer=, or give token ids and skip_tokenizer_init=True"


def check_tokenizer(folder: Path) -> None:
    """Checks that there is a tokenizer, without loading it.

    Raises:
        CheckpointError: the folder holds none.
    """
    if not _has_files(folder):
        raise CheckpointError(f"{folder} has no tokenizer that can be loaded: no such file; {_ADVICE}")


def required_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads a tokenizer.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    check_tokenizer(folder)
    try:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_ADVICE}") from error


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads a tokenizer; None when the folder holds none.

    Raises:
        CheckpointError: there are tokenizer files, and they cannot be loaded.
    """
    if not _has_files(folder):
        return None
    from transformers import AutoTokenizer

    try:
        with reading_gguf() if is_gguf(folder) else quiet_transformers():
            return AutoTokenizer.from_pretrained(**source_options(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"{folder} has no tokenizer that can be loaded ({one_line(error, 200)})") from error


def _has_files(folder: Path) -> bool:
    if is_gguf(folder):
        return has_tokenizer(folder) or _has_files(folder.parent)
    return any((folder / name).is_file() for name in _FILES)
