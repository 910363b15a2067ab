"""The ranks after the first, as the first one sees them: started, ordered, watched and ended."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug import threads
from specplug.errors import EngineDeadError, StartupError, one_line
from specplug.model.parallel.commands import JOINED, READY, Order, RankSettings, encode, receive
from specplug.model.parallel.group import abort, process_group
from specplug.model.parallel.torchrun import accept_ranks, launched_rank, meeting_folder

WORKER = "specplug.model.parallel.worker"
_POLL_SECONDS = 0.1
_REASON_SECONDS = 2.0  # a rank that fails first breaks the connection, then ends
_END_SECONDS = 10.0  # what a rank has to end by itself once its pipe is closed


@attrs.define(eq=False)
class _Worker:
    """Another rank; torchrun watches the processes that it started."""

    rank: int
    connection: Connection
    process: subprocess.Popen[bytes] | None = None
    _said: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether its process has ended."""
        return not self._listen() if self.process is None else self.process.poll() is not None

    def _listen(self) -> bool:
        """Takes in what it says of its end; False once it has closed the connection."""
        try:
            while self.connection.poll():
                if (message := receive(self.connection)) not in (JOINED, READY):
                    self._said = str(message)
        except (EOFError, OSError):
            return False
        return True

    @property
    def failure(self) -> str:
        """Why it ended: its own words, else its exit status."""
        self._listen()
        if self._said:
            return self._said
        code = None if self.process is None else self.process.poll()
        return "it closed the connection" if code is None else f"exit status {code}"


class Ranks:
    """The processes of the ranks after the first, and this one's place in their group.

    Args:
        settings: the first rank's.
    """

    def __init__(self, settings: RankSettings) -> None:
        self.size = settings.size
        self._failure = ""
        self._is_closing = False
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._stack = ExitStack()
        try:
            self._stack.callback(self._end_workers)
            if settings.device.type == "cpu":
                self._stack.enter_context(fewer_threads(settings.size))
            folder = self._start(settings)
            own = _settings_of(attrs.evolve(settings, meeting=folder / "meeting"), 0)
            for worker in self._workers:
                with suppress(OSError):  # it has ended: said below
                    worker.connection.send_bytes(encode(_settings_of(own, worker.rank)))
            for worker in self._workers:
                self._wait_for(worker, JOINED)
            self._stack.enter_context(process_group(0, own.size, own.meeting, own.device))
            self._stack.callback(self._dismiss)  # first of all: ranks leave the group at the same time
            if own.device.type == "cuda":  # on a CPU a sum with a rank that has ended fails by itself
                threading.Thread(target=self._watch, name="specplug-ranks", daemon=True).start()
        except BaseException:
            self.close()
            raise

    def _start(self, settings: RankSettings) -> Path:
        """Starts the other ranks, or meets those that torchrun started; returns the folder in which all meet."""
        if launched_rank(self.size) is not None:
            folder = meeting_folder()
            self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
            self._workers += [_Worker(rank, pipe) for rank, pipe in enumerate(accept_ranks(folder, self.size), 1)]
            return folder
        for rank in range(1, self.size):
            self._workers.append(_start(_settings_of(settings, rank)))
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="specplug-ranks-")))

    def wait_until_ready(self) -> None:
        """Waits until every rank has loaded its part.

        Raises:
            StartupError: one of them failed.
        """
        for worker in self._workers:
            self._wait_for(worker, READY)

    def explain(self, error: Exception) -> Exception:
        """The error to raise for one that this rank met at start-up: another rank's, if that has ended."""
        deadline = time.monotonic() + _REASON_SECONDS
        while time.monotonic() < deadline:
            if ended := self._ended():
                return StartupError(f"rank {ended.rank} of {self.size} failed: {ended.failure}")
            time.sleep(_POLL_SECONDS)
        return error

    def _ended(self) -> _Worker | None:
        return next((worker for worker in self._workers if worker.has_ended), None)

    def order(self, name: str, *arguments: Any) -> None:
        """Has every other rank make a call; does not wait for it.

        Raises:
            EngineDeadError: a rank has ended.
        """
        if self._failure:
            raise EngineDeadError(self._failure)
        message = encode(Order(name, arguments))
        for worker in self._workers:
            try:
                worker.connection.send_bytes(message)
            except OSError as error:
                raise self.broken(error) from error

    def broken(self, error: BaseException) -> EngineDeadError:
        """Ends all ranks, since they no longer agree on what runs; the error to raise says why."""
        reason = one_line(error)
        deadline = time.monotonic() + _REASON_SECONDS
        while time.monotonic() < deadline:
            if ended := self._ended():
                reason = f"rank {ended.rank} of {self.size} ended ({ended.failure})"
                break
            time.sleep(_POLL_SECONDS)
        self._failure = f"{reason}: the engine's {self.size} ranks are stopped; start a new engine"
        self._end_workers(at_once=True)
        return EngineDeadError(self._failure)

    def close(self) -> None:
        """Ends the other ranks and leaves the group. Safe to call twice."""
        self._stack.close()

    def _wait_for(self, worker: _Worker, what: str) -> None:
        while not worker.connection.poll(_POLL_SECONDS):
            if worker.process is not None and worker.has_ended:
                raise StartupError(f"rank {worker.rank} of {self.size} failed: {worker.failure}")
        try:
            message = receive(worker.connection)
        except (EOFError, ConnectionResetError):
            if worker.process is not None:
                worker.process.wait(_END_SECONDS)
            raise StartupError(f"rank {worker.rank} of {self.size} failed: {worker.failure}") from None
        if message != what:
            raise StartupError(f"rank {worker.rank} of {self.size} failed: {message}")

    def _watch(self) -> None:
        """Ends the sums of this rank when another one ends: on a GPU they would wait for ever."""
        processes = [worker.process for worker in self._workers if worker.process is not None]
        while not self._is_closing:
            if any(process.poll() is not None for process in processes):
                time.sleep(_REASON_SECONDS)
                if not self._is_closing:
                    abort()
                return
            time.sleep(_POLL_SECONDS)

    def _dismiss(self) -> None:
        self._is_closing = True
        for worker in self._workers:
            worker.connection.close()

    def _end_workers(self, *, at_once: bool = False) -> None:
        with self._lock:
            workers, self._workers = self._workers, []
        processes = [worker.process for worker in workers if worker.process is not None]
        for worker in workers:
            worker.connection.close()
        for process in processes:
            if at_once:
                process.kill()
        for process in processes:
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def threads_per_rank(size: int) -> int:
    """PyTorch threads of each rank on a CPU: the cores are shared out."""
    return max(1, threads.usable_cores() // size)


@contextmanager
def fewer_threads(size: int) -> Iterator[None]:
    """This rank's share of the cores inside, unless the user chose a number."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(before, threads_per_rank(size)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _settings_of(settings: RankSettings, rank: int) -> RankSettings:
    device = settings.device
    own = torch.device("cuda", (device.index or 0) + rank) if device.type == "cuda" else device
    return attrs.evolve(settings, rank=rank, device=own)


def _start(settings: RankSettings) -> _Worker:
    ours, theirs = socket.socketpair()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank(settings.size)))
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if _has_file(sys.stderr) else subprocess.DEVNULL,
            env=environment,
        )
    return _Worker(settings.rank, Connection(ours.detach()), process)


def _has_file(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
