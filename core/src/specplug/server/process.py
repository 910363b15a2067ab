"""The process of a server: its socket, its signals, loading the model, and draining at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import stat
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import attrs
import uvicorn
from fastapi import FastAPI

from specplug.async_llm import AsyncLLM
from specplug.errors import ConfigurationError
from specplug.server.settings import DEFAULT_DRAIN_SECONDS
from specplug.server.state import ServerState

Result = TypeVar("Result")
_FLUSH_SECONDS = 5  # after the last request, for responses that are being sent
_BACKLOG = 2048
# The side that closes an idle connection must be the client: a request that is on its way when the server closes is lost.
# OpenAI's client keeps idle connections for 5 s, nginx and the load balancers of clouds for 60.
_KEEP_ALIVE_SECONDS = 75
_LOOPBACK = ("127.", "::1", "localhost")


@attrs.frozen(kw_only=True)
class Endpoint:
    """Where a server listens.

    Attributes:
        host: a name or an address; empty with `uds`.
        port: 0 takes a free one.
        uds: the path of a Unix domain socket, instead of host and port.
        ssl_certfile: the certificate chain for TLS.
        ssl_keyfile: its private key, if it is in another file.
        access_log: whether each request is logged.
        drain_timeout: seconds that running requests get to end after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    access_log: bool = False
    drain_timeout: float = DEFAULT_DRAIN_SECONDS

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.uds is not None or self.host.startswith(_LOOPBACK)

    def check_tls(self) -> None:
        """Reads the files for TLS.

        Raises:
            ConfigurationError: a file cannot be read, or is not what it should be.
        """
        if self.ssl_certfile is None:
            if self.ssl_keyfile is not None:
                raise ConfigurationError("--ssl-keyfile needs --ssl-certfile")
            return
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
        except (OSError, ssl.SSLError) as error:
            files = " and ".join(filter(None, (self.ssl_certfile, self.ssl_keyfile)))
            raise ConfigurationError(f"TLS: {files} cannot be used: {error}") from error

    def bind(self) -> socket.socket:
        """Opens the socket.

        Raises:
            ConfigurationError: it cannot be opened.
        """
        if self.uds is not None:
            return self._bind_path(self.uds)
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ConfigurationError(
                f"--host {self.host} --port {self.port}: {error.strerror or error}; give another one"
            ) from error
        return listener

    def url(self, listener: socket.socket) -> str:
        """Where clients reach the socket."""
        if self.uds is not None:
            return f"unix:{self.uds}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.ssl_certfile else ''}://{host}:{listener.getsockname()[1]}"

    @staticmethod
    def _bind_path(path: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if Path(path).exists() and stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
                Path(path).unlink()  # of a server that was killed
            listener.bind(path)
        except OSError as error:
            listener.close()
            raise ConfigurationError(f"--uds {path}: {error.strerror or error}") from error
        return listener


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(path)
        except OSError:
            return False
    return True


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Does nothing: `run_server` handles them."""
        yield


async def run_server(
    app: FastAPI,
    state: ServerState,
    endpoint: Endpoint,
    listener: socket.socket,
    load: Callable[[], AsyncLLM],
    on_ready: Callable[[], None] = lambda: None,
    on_drain: Callable[[int], None] = lambda number: None,
) -> None:
    """Serves until SIGTERM or SIGINT. Requests are answered from the beginning: with 503 until the model is loaded.

    At the first signal no more requests are taken, and those in work get `drain_timeout` seconds to end; at the second one
    they are aborted.

    Args:
        app: the application.
        state: what it serves.
        endpoint: where.
        listener: the result of `endpoint.bind`.
        load: starts the engine; called in a thread.
        on_ready: called when requests are served.
        on_drain: called with the number of sequences in work when a signal has arrived.

    Raises:
        SpecplugError: the engine does not start.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="info" if endpoint.access_log else "warning",
        access_log=endpoint.access_log,
        lifespan="off",
        ws="none",
        server_header=False,
        root_path=state.settings.root_path,
        ssl_certfile=endpoint.ssl_certfile,
        ssl_keyfile=endpoint.ssl_keyfile,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    server = _Server(config)
    stopping, aborting = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (aborting if stopping.is_set() else stopping).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        engine = await _unless(stopping, _in_daemon(load))
        if engine is None:
            return
        try:
            state.set_engine(engine)
            on_ready()
            await stopping.wait()
            state.is_draining = True
            on_drain(engine.num_unfinished)
            if not await _unless(aborting, engine.drain(endpoint.drain_timeout)):
                engine.abort_all()
            await _flush(state)
        finally:
            await asyncio.to_thread(engine.close)
    finally:
        server.should_exit = True
        await serving
        if endpoint.uds is not None:
            Path(endpoint.uds).unlink(missing_ok=True)


async def _flush(state: ServerState) -> None:
    """Waits until the last responses are sent, but not forever."""
    deadline = asyncio.get_running_loop().time() + _FLUSH_SECONDS
    while state.num_requests and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.02)


async def _unless(event: asyncio.Event, work: Awaitable[Result]) -> Result | None:
    """The result of work; None if the event is set before, and then the work is cancelled."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        waiting.cancel()
        task.cancel()


def _in_daemon(load: Callable[[], AsyncLLM]) -> asyncio.Future[AsyncLLM]:
    """Runs a function in a thread that does not keep the process alive: a start cannot be interrupted."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[AsyncLLM] = loop.create_future()

    def settle(result: AsyncLLM | None, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = load()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="specplug-start", daemon=True).start()
    return future
