"""Calls from several threads on one engine. Their requests share its batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from specplug.request import Request, StepOutput

if TYPE_CHECKING:
    from specplug.engine.engine import Engine


class Call:
    """The requests of one caller, and their outputs. The `OutputListener` of these requests.

    Args:
        requests: all of them.
        streams: whether the caller wants every output, or only the last one of each request.

    Attributes:
        arrived: outputs that the caller has not taken yet.
        woken: set if there is an output to take, or a request has ended.
    """

    def __init__(self, requests: Sequence[Request], *, streams: bool) -> None:
        self.requests = list(requests)
        self.arrived: deque[StepOutput] = deque()
        self.woken = threading.Event()
        self._streams = streams
        self._ended: set[int] = set()  # requests whose last output has arrived
        for request in self.requests:
            request.listener = self

    @property
    def has_ended(self) -> bool:
        """Whether all outputs of its requests have arrived. A request itself ends earlier, in the middle of a step."""
        return len(self._ended) == len(self.requests)

    @property
    def is_ready(self) -> bool:
        """Whether there is an output to take, or nothing more to wait for."""
        return bool(self.arrived) or self.has_ended

    def add(self, output: StepOutput) -> None:
        """Receives what a step committed for one of its requests. Called by the thread that runs the step."""
        if self._streams or output.request.is_finished:
            self.arrived.append(output)
        if output.request.is_finished:
            self.end(output.request)
        elif self._streams:
            self.woken.set()

    def end(self, request: Request) -> None:
        """Notes that no more outputs of a request will arrive."""
        self._ended.add(request.number)
        self.woken.set()

    def is_last(self, output: StepOutput) -> bool:
        """Whether an output that was taken is the last one of its request."""
        request = output.request
        return request.number in self._ended and all(other.request is not request for other in tuple(self.arrived))


class Calls:
    """Steps an engine for all calls. The first thread runs the steps; the others sleep until their call is ready."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._has_driver = False
        self._sleeping: deque[Call] = deque()

    def advance(self, call: Call) -> None:
        """Returns as soon as a call is ready."""
        try:
            if self._becomes_driver(call):
                try:
                    while not call.is_ready:
                        self._engine.step()
                finally:
                    self._has_driver = False
        finally:
            self._wake_next()

    def _becomes_driver(self, call: Call) -> bool:
        """Waits until the call is ready (False), or until no other thread runs the steps (True)."""
        while True:
            call.woken.clear()
            if call.is_ready:
                return False
            with self._lock:
                if not self._has_driver:
                    self._has_driver = True
                    return True
                self._sleeping.append(call)
            try:
                call.woken.wait()
            finally:
                with self._lock:
                    self._sleeping.remove(call)

    def _wake_next(self) -> None:
        """When a thread leaves and none runs the steps, a sleeping one takes over."""
        with self._lock:
            if not self._has_driver and self._sleeping:
                self._sleeping[0].woken.set()
