"""Where specplug keeps what it works out once: parity verdicts, compiled kernels, compiled forwards.

Some of it is code that is loaded into the process. It lies in folders that nobody else can write to, or is not used.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CacheError(Exception):
    """The cache folder, or a file in it, cannot be used; the message says why, and what to change."""


def default_cache_folder() -> Path:
    """`$SPECPLUG_CACHE`, else `specplug` below the user's cache folder.

    Raises:
        CacheError: there is no such folder, since the user has no home.
    """
    if named := os.environ.get("SPECPLUG_CACHE"):
        return Path(named).absolute()
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named).absolute() / "specplug"
    try:
        return Path.home() / ".cache" / "specplug"
    except RuntimeError as error:
        raise CacheError("this user has no home folder: name a folder in SPECPLUG_CACHE") from error


def private_folder(name: str = "") -> Path:
    """The cache folder, or a folder in it: made if need be, and nobody else's to write to.

    Raises:
        CacheError: it cannot be made, or somebody else could have put something there.
    """
    folder = default_cache_folder()
    _make_private(folder)
    for part in Path(name).parts:
        folder /= part
        _make_private(folder)
    return folder


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CacheError(f"the cache folder {folder} cannot be made: {error.strerror or error}") from error
    check_private(folder)


def check_private(path: Path) -> None:
    """Refuses a file or folder that is not the user's own, or that others may write to.

    Raises:
        CacheError: it is such a one, or is not there.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror or error}") from error
    if os.name != "posix":
        return
    if status.st_uid != os.geteuid():
        raise CacheError(
            f"{path} belongs to user {status.st_uid} and not to user {os.geteuid()}: name a folder of your own in "
            "SPECPLUG_CACHE"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(f"others may write to {path}: take that away (chmod go-w), or name another in SPECPLUG_CACHE")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to be written, which takes its place under `path` when the block ends, whole and nobody else's to write to.

    Raises:
        OSError: the folder cannot be written to.
    """
    handle, name = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o700 if path.suffix == ".so" else 0o600)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
