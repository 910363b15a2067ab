"""When event loops are told that outputs have arrived."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict

from specplug.streams.stream import RequestStream

# Of all streams together. Passing an output on through HTTP takes 0.1 to 0.2 ms of the same processors, and the client as much.
_SECONDS_PER_OUTPUT = 0.002


class Delivery:
    """Tells consumers of outputs: each event loop once per step, for all of its streams. For the engine's thread alone.

    Streams that were told too recently wait for a later step: otherwise many streams would spend more time on passing
    outputs on than the engine spends on a step. The first output and the last one never wait.
    """

    def __init__(self) -> None:
        self._touched: dict[RequestStream, None] = {}  # in this order

    def touch(self, stream: RequestStream) -> None:
        """Notes that a stream has something to take."""
        self._touched[stream] = None

    def wake(self) -> None:
        """Tells the consumers of the streams whose turn it is."""
        if not self._touched:
            return
        # All streams that generate are in it after a step, and requests that want a single output only at their end.
        now, gap = time.monotonic(), _SECONDS_PER_OUTPUT * len(self._touched)
        due = [stream for stream in self._touched if stream.has_ended or now - stream.woken_at >= gap]
        by_loop: dict[asyncio.AbstractEventLoop, list[RequestStream]] = defaultdict(list)
        for stream in due:
            stream.woken_at = now
            del self._touched[stream]
            by_loop[stream.loop].append(stream)
        for loop, streams in by_loop.items():
            try:
                loop.call_soon_threadsafe(_notify, streams)
            except RuntimeError:  # the loop is closed: there is nobody to take the outputs
                for stream in streams:
                    stream.abort()


def _notify(streams: list[RequestStream]) -> None:
    for stream in streams:
        stream.notify()
