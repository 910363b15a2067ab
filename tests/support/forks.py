"""What a forked process says before it ends, and its end."""

from __future__ import annotations

import os
import select
import signal


def said_by(child: int, read: int, write: int) -> str:
    """What the child wrote into a pipe within 20 seconds; it is killed then, and the pipe closed."""
    try:
        ready, _, _ = select.select([read], [], [], 20)
        return os.read(read, 4096).decode() if ready else "nothing: it hangs"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
