"""A rank after the first: it loads its part of the target and runs what the first rank orders, until that one ends.

    python -m specplug.model.parallel.worker FD

is how the first rank starts it; FD is the pipe's file descriptor.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from specplug import threads
from specplug.errors import one_line

with threads.importing():
    import torch

from specplug.model.compile.runners import compile_forwards
from specplug.model.kv_cache import KVCache
from specplug.model.load.checkpoint import load_config
from specplug.model.load.weights import load_model
from specplug.model.parallel.commands import JOINED, READY, RankSettings, encode, receive
from specplug.model.parallel.group import abort, process_group
from specplug.model.parallel.runner import RankRunner, ReceivedTokens

_END_SECONDS = 10.0  # what this rank has to end by itself once the first one has closed the pipe


def serve_rank(connection: Connection) -> None:
    """Runs a rank until the first one closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all ranks of a terminal; the first one decides
    try:
        with _reported(connection):
            settings: RankSettings = receive(connection)
            connection.send_bytes(encode(JOINED))
            _serve(connection, settings)
    except EOFError:
        return
    except BaseException as error:
        traceback.print_exc()
        raise SystemExit(1) from error


def _end_after(pipe: int) -> None:
    """Ends this process after the first rank: on a GPU a sum without that one waits for ever."""
    poll = select.poll()
    poll.register(pipe, 0)  # a hang-up is always reported
    poll.poll()
    time.sleep(_END_SECONDS / 2)
    threading.Thread(target=abort, daemon=True).start()  # may wait for the device
    time.sleep(_END_SECONDS / 2)
    os._exit(1)


@contextmanager
def _reported(connection: Connection) -> Iterator[None]:
    """Tells the first rank at once why this one ends: it may be waiting for it in a sum."""
    try:
        yield
    except EOFError:
        raise
    except BaseException as error:
        with suppress(OSError):
            connection.send_bytes(encode(one_line(error, 300)))
        raise


def _serve(connection: Connection, settings: RankSettings) -> None:
    if settings.device.type == "cuda":
        torch.cuda.set_device(settings.device)
    with (
        process_group(settings.rank, settings.size, settings.meeting, settings.device),
        _reported(connection),  # before it leaves the group, which may take seconds
        torch.no_grad(),
    ):
        config = load_config(settings.folder, trust_remote_code=settings.trust_remote_code)
        architecture = settings.architecture
        model = load_model(
            settings.folder,
            config,
            settings.dtype,
            settings.device,
            towers=architecture.towers,
            read_weights=architecture.read_weights,
            trust_remote_code=settings.trust_remote_code,
            shards=architecture.shards,
            num_ranks=settings.size,
        )
        cache = KVCache(
            architecture.kv_layers, settings.num_blocks, settings.block_size, settings.dtype, settings.device
        )
        runner = RankRunner(settings.rank, settings.size, model, architecture, cache, settings.device)
        if settings.runs_ahead:
            runner.pending = ReceivedTokens(settings.device)
        orders: dict[str, Callable[..., Any]] = {
            "forward": partial(runner.forward, lasting=False),
            "compile": partial(compile_forwards, [runner]),
            "move": cache.move,
            "clear": cache.clear,
        }
        connection.send_bytes(encode(READY))
        try:
            while True:
                order = receive(connection)
                orders[order.name](*order.arguments)
        finally:
            runner.graphs = None  # they hold the group's sums, and a group that is in use does not end


def main() -> None:
    """Runs the process of a rank. It ends at once: what CUDA still runs may wait for a rank that has ended."""
    pipe = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_after, args=(pipe.fileno(),), daemon=True).start()
    status = 0
    try:
        serve_rank(pipe)
    except SystemExit:
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
