"""When event loops are told that outputs have arrived."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from weakref import WeakKeyDictionary

from specplug.streams.stream import RequestStream

# Of one core. An event loop competes with the steps for the interpreter's lock and, on small machines, for the cores; what it
# sends costs its clients about half as much again.
_SHARE = 0.05
_USUAL_SECONDS = 1e-4  # to pass an output on through HTTP, before it is measured
_MOST_SECONDS = 4e-4  # above, the loop did something else too
_WEIGHT = 0.1  # of the last measurement


class Delivery:
    """Tells consumers of outputs: each event loop once per step, for all of its streams. For the engine's thread alone.

    Streams that were told too recently wait for a later step: otherwise many streams would spend more time on passing
    outputs on than the engine spends on a step. The first output and the last one never wait.
    """

    def __init__(self) -> None:
        self._touched: dict[RequestStream, None] = {}  # in this order
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = WeakKeyDictionary()

    def touch(self, stream: RequestStream) -> None:
        """Notes that a stream has something to take."""
        self._touched[stream] = None

    def wake(self) -> None:
        """Tells the consumers of the streams whose turn it is."""
        if not self._touched:
            return
        # All streams that generate are in it after a step, and requests that want a single output only at their end.
        now, number = time.monotonic(), len(self._touched)
        by_loop: dict[asyncio.AbstractEventLoop, list[RequestStream]] = defaultdict(list)
        gaps = {loop: number * self._of(loop).gap for loop in {stream.loop for stream in self._touched}}
        for stream in self._touched:
            if stream.has_ended or now - stream.woken_at >= gaps[stream.loop]:
                stream.woken_at = now
                by_loop[stream.loop].append(stream)
        for loop, streams in by_loop.items():
            for stream in streams:
                del self._touched[stream]
            try:
                loop.call_soon_threadsafe(self._of(loop).notify, streams)
            except RuntimeError:  # the loop is closed: there is nobody to take the outputs
                for stream in streams:
                    stream.abort()

    def _of(self, loop: asyncio.AbstractEventLoop) -> _Loop:
        found = self._loops.get(loop)
        if found is None:
            found = self._loops[loop] = _Loop()
        return found


class _Loop:
    """An event loop, and what passing outputs on costs it.

    Attributes:
        seconds: of processor time per output.
    """

    def __init__(self) -> None:
        self.seconds = _USUAL_SECONDS
        self._since = 0.0
        self._num_told = 0

    @property
    def gap(self) -> float:
        """Seconds between two outputs of all its streams together."""
        return self.seconds / _SHARE

    def notify(self, streams: list[RequestStream]) -> None:
        """Tells consumers. Called in the loop."""
        now = time.thread_time()
        if self._num_told:
            spent = (now - self._since) / self._num_told
            self.seconds += _WEIGHT * (min(max(spent, 0.0), _MOST_SECONDS) - self.seconds)  # < 0: it changed its thread
        self._since, self._num_told = now, len(streams)
        for stream in streams:
            stream.notify()
