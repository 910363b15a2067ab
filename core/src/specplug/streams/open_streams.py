"""The streams of one engine that have not ended."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from specplug.errors import SpecplugError
from specplug.streams.stream import RequestStream


class OpenStreams:
    """Streams by the names of their requests, for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[str, RequestStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, streams: Iterable[RequestStream]) -> None:
        """Adds streams, all at once."""
        with self._lock:
            self._streams.update({stream.request_id: stream for stream in streams})

    def get(self, name: str) -> RequestStream | None:
        """The stream of a request; None if there is none, or it has ended."""
        with self._lock:
            return self._streams.get(name)

    def all(self) -> list[RequestStream]:
        """All of them."""
        with self._lock:
            return list(self._streams.values())

    def remove(self, name: str) -> None:
        """Removes the stream of a request, if there is one."""
        with self._lock:
            self._streams.pop(name, None)

    def fail(self, error: SpecplugError) -> None:
        """Ends all of them with an error."""
        for stream in self.all():
            stream.fail(error)
