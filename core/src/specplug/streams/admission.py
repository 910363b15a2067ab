"""How many sequences run or wait, and which names they have."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from specplug.errors import QueueFullError, RequestError
from specplug.values import shown


class Admission:
    """Lets requests in while there is room. Any thread may use it.

    Args:
        max_num_seqs: how many sequences run at once.
        max_queued: how many more may wait; None sets no limit.

    Attributes:
        num_unfinished: how many sequences run or wait.
    """

    def __init__(self, max_num_seqs: int, max_queued: int | None) -> None:
        self.num_unfinished = 0
        self._max_num_seqs = max_num_seqs
        self._limit = None if max_queued is None else max_num_seqs + max_queued
        self._counts: dict[str, int] = {}  # the sequences of each unfinished request
        self._is_draining = False
        self._lock = threading.Lock()

    @property
    def is_empty(self) -> bool:
        """Whether no name is in use."""
        return not self._counts

    def check(self) -> None:
        """Refuses a request that there is no room for.

        Raises:
            QueueFullError: too many requests are waiting, or no more are taken.
        """
        if self._is_draining:
            raise QueueFullError("the engine is shutting down and takes no more requests")
        if self._limit is not None and self.num_unfinished >= self._limit:
            raise QueueFullError(
                f"{self.num_unfinished} sequences are running or waiting, and the limit is {self._limit} "
                f"(max_num_seqs={self._max_num_seqs} plus max_queued_requests); try again later"
            )

    def enter(self, counts: Mapping[str, int], num_names: int) -> None:
        """Lets requests in, all of them or none.

        Args:
            counts: the sequences of each request, by its name.
            num_names: how many names there were; more than in `counts` if one was there twice.

        Raises:
            QueueFullError: see `check`.
            RequestError: a name is in use.
        """
        with self._lock:
            self.check()
            taken = next((name for name in counts if name in self._counts), None)
            if taken is not None or len(counts) < num_names:
                raise RequestError(f"request_id={shown(taken or next(iter(counts)))} is already in use")
            self._counts.update(counts)
            self.num_unfinished += sum(counts.values())

    def leave(self, name: str) -> None:
        """Gives the room of a request back. Safe to call twice."""
        with self._lock:
            self.num_unfinished -= self._counts.pop(name, 0)

    def end(self) -> None:
        """Lets nothing in any more."""
        with self._lock:
            self._is_draining = True
