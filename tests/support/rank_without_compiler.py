"""A rank that cannot compile its part of the target; started like `specplug.model.parallel.worker`."""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from specplug.model.compile import compiled
from specplug.model.parallel.worker import serve_rank


def fail(*_: Any) -> NoReturn:
    """In place of the compiler."""
    raise RuntimeError("there is no compiler here")


if __name__ == "__main__":
    vars(compiled)["compile_graph"] = fail
    serve_rank(Connection(int(sys.argv[1])))
