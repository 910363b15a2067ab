"""Prints by how many bytes a process grows at most while it loads a GGUF file: python loading_peak.py FIRST FILE DTYPE.

FIRST is a file that is loaded before, for what the libraries need once.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch

from specplug.model.load.checkpoint import load_config
from specplug.model.load.weights import load_model


def own_bytes() -> int:
    """Bytes of this process's memory that are no file's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def main() -> None:
    first, file, dtype = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3])
    load_model(first, load_config(first), dtype, torch.device("cpu"))
    config, ended, sizes = load_config(file), threading.Event(), [own_bytes()]

    def watch() -> None:
        while not ended.wait(0.002):
            sizes.append(own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        load_model(file, config, dtype, torch.device("cpu"))
    finally:
        ended.set()
        watcher.join()
    print(max(sizes) - sizes[0])


if __name__ == "__main__":
    main()
