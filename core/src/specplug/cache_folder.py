"""The cache folder: parity results, compiled kernels, compiled forwards.

Some files contain code that is loaded into the process. They are used only if no other user can write to them.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CacheError(Exception):
    """The cache folder or a file in it cannot be used; the message says why, and how to fix it."""


def default_cache_folder() -> Path:
    """Returns `$SPECPLUG_CACHE`, or `specplug` in the cache folder of the user.

    Raises:
        CacheError: the user has no home folder.
    """
    if named := os.environ.get("SPECPLUG_CACHE"):
        return Path(named).absolute()
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named).absolute() / "specplug"
    try:
        return Path.home() / ".cache" / "specplug"
    except RuntimeError as error:
        raise CacheError("this user has no home folder: set SPECPLUG_CACHE to a folder") from error


def private_folder(name: str = "") -> Path:
    """Returns the cache folder or a subfolder, created if necessary, to which no other user can write.

    Raises:
        CacheError: it cannot be created, or another user can write to it.
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
        raise CacheError(f"the cache folder {folder} cannot be created: {error.strerror or error}") from error
    check_private(folder)


def check_private(path: Path) -> None:
    """Checks that a file or folder belongs to the user, and that no other user can write to it.

    Raises:
        CacheError: it does not, another user can, or it does not exist.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror or error}") from error
    if os.name != "posix":
        return
    if status.st_uid != os.geteuid():
        raise CacheError(
            f"{path} belongs to user {status.st_uid} and not to user {os.geteuid()}: set SPECPLUG_CACHE to your "
            "own folder"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(f"others may write to {path}: run chmod go-w on it, or set SPECPLUG_CACHE to another folder")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file for writing, which replaces `path` atomically when the block ends. Only the user may write to it.

    Raises:
        OSError: the folder is not writable.
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
