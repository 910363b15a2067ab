"""A server in this process, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import uvicorn

from specplug import AsyncLLM
from specplug.server.app import create_app
from specplug.server.metrics import ServerMetrics
from specplug.server.settings import ServerSettings
from specplug.server.state import ServerState

OPTIONS = {
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1},
    "memory": "256MiB",
    "dtype": "float32",
    "max_num_seqs": 4,
    "compile": False,
}
"""The engine's options in tests of the server."""
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<assistant>' }}{{ opening }}{% endif %}"
)


@attrs.frozen
class Live:
    """A running server.

    Attributes:
        url: its address.
        state: what it serves.
    """

    url: str
    state: ServerState

    @property
    def engine(self) -> AsyncLLM:
        return self.state.engine

    def wait_idle(self, seconds: float = 30) -> None:
        """Waits until nothing is in work, and checks that everything is free."""
        engine = self.engine
        scheduler = engine.engine.scheduler
        wait_until(lambda: not (self.state.num_requests or engine.num_unfinished or scheduler.has_work), seconds)
        assert len(scheduler._free_slots) == engine.config.max_num_seqs
        assert not engine._streams
        assert engine._admission.is_empty


def wait_until(holds: Callable[[], Any], seconds: float = 30) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.005)


@contextmanager
def live(
    engine: AsyncLLM | None, metrics: ServerMetrics | None = None, *, send_buffer: int | None = None, **settings: Any
) -> Iterator[Live]:
    """Serves an engine on a free port; `send_buffer` limits what the system takes for a client that does not read."""
    options = {"model_names": ("tiny",), "chat_template": TEMPLATE, **settings}
    state = ServerState(ServerSettings(**options), engine, metrics)
    config = uvicorn.Config(create_app(state), port=0, log_config=None, lifespan="off", ws="none", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        wait_until(lambda: server.started)
        listening = server.servers[0].sockets[0]
        if send_buffer is not None:  # connections have that of the socket that accepts them
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        port = listening.getsockname()[1]
        yield Live(f"http://127.0.0.1:{port}", state)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server hangs"
