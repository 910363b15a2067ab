"""Standard streams that can be used whatever the command was started with."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _ForgivingFile(io.FileIO):
    """A file to which nothing is written once that fails: nobody reads it, and there is nobody to tell."""

    def write(self, data: Any, /) -> int:
        """Writes, or does as if."""
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def open_streams() -> None:
    """Gives the process the standard streams that it lacks, and lets no failure to write to standard error end a command.

    A stream that was closed (`2>&-`) becomes /dev/null: nothing else is opened in its place, and whoever writes to it goes on.
    Standard output that somebody stops reading (`| head`) is an error as before, since it is what the command is for.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: the closed stream's own
            os.set_inheritable(number, True)
            stream = os.fdopen(number, mode, encoding="utf-8")
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _forgiving(sys.stderr)


def _forgiving(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    file: Any = _ForgivingFile(stream.fileno(), "w", closefd=False)
    file.name = stream.name
    return io.TextIOWrapper(io.BufferedWriter(file), encoding=stream.encoding, errors="replace", line_buffering=True)
