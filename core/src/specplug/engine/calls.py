"""Calls from several threads on one engine: their requests share its batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from specplug.request import Request

if TYPE_CHECKING:
    from specplug.engine.engine import Engine, StepOutput


class Call:
    """What one caller waits for: the outputs of its requests.

    Args:
        requests: all of them; each is bound to the call.
        streams: whether every output is wanted; else only the last one of each request.

    Attributes:
        arrived: outputs that nobody has taken yet.
        woken: set when there is news.
    """

    def __init__(self, requests: Sequence[Request], *, streams: bool) -> None:
        self.requests = list(requests)
        self.arrived: deque[StepOutput] = deque()
        self.woken = threading.Event()
        self._streams = streams
        for request in self.requests:
            request.call = self

    @property
    def has_ended(self) -> bool:
        """Whether all its requests have."""
        return all(request.is_finished for request in self.requests)

    @property
    def has_news(self) -> bool:
        """Whether there is anything to take, or nothing more to wait for."""
        return bool(self.arrived) or self.has_ended

    def add(self, output: StepOutput) -> None:
        """Takes in what a step committed for one of its requests, in whichever thread that ran."""
        if self._streams or output.request.is_finished:
            self.arrived.append(output)
            self.woken.set()


class Calls:
    """Steps an engine for all calls: the first thread to come runs the steps, the others sleep until there is news for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._is_driven = False
        self._sleeping: deque[Call] = deque()

    def advance(self, call: Call) -> None:
        """Returns as soon as there is news for a call."""
        try:
            if self._is_to_drive(call):
                try:
                    while not call.has_news:
                        self._engine.step()
                finally:
                    self._is_driven = False
        finally:
            self._wake_next()

    def _is_to_drive(self, call: Call) -> bool:
        """Waits for news (False), or until nobody else runs the steps."""
        while True:
            call.woken.clear()
            if call.has_news:
                return False
            with self._lock:
                if not self._is_driven:
                    self._is_driven = True
                    return True
                self._sleeping.append(call)
            try:
                call.woken.wait()
            finally:
                with self._lock:
                    self._sleeping.remove(call)

    def _wake_next(self) -> None:
        """A thread leaves: where nobody runs the steps, one that waits is to."""
        with self._lock:
            if not self._is_driven and self._sleeping:
                self._sleeping[0].woken.set()
