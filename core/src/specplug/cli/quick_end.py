"""The end of the process, without the seconds that taking the interpreter apart costs after PyTorch's import."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def quick_end() -> Iterator[None]:
    """Ends the process right after its last exit handler, with the status that leaves the block.

    What is registered inside the block still runs: exit handlers are called in the opposite order. Threads are waited
    for before them, as always.
    """
    status = 1  # what an exception ends with, whose traceback Python writes before any exit handler

    def end() -> None:
        if "torch" not in sys.modules:
            return
        try:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            return  # Python reports streams that cannot be written to
        os._exit(status)

    atexit.register(end)
    try:
        yield
        status = 0
    except SystemExit as end_of_command:
        code = end_of_command.code
        status = code if isinstance(code, int) else int(code is not None)
        raise
