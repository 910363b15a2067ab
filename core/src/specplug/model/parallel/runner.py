"""The first rank's runner and KV cache: what they do, the other ranks do too."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from specplug.model.kv_cache import KVCache
from specplug.model.parallel.ranks import Ranks
from specplug.model.rows import ForwardRow
from specplug.model.runner import ModelRunner


class LeadingCache(KVCache):
    """The first rank's part of the KV cache.

    Args:
        ranks: the others.
        arguments: see `KVCache`.
    """

    def __init__(self, ranks: Ranks, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._ranks = ranks

    def move(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """See `KVCache.move`."""
        if sources:
            self._ranks.order("move", list(sources), list(destinations))
        super().move(sources, destinations)

    def clear(self, slots: Sequence[int]) -> None:
        """See `KVCache.clear`."""
        if slots:
            self._ranks.order("clear", list(slots))
        super().clear(slots)


class LeadingRunner(ModelRunner):
    """The first rank's part of the target. Drafting, verification and sampling happen on this rank alone.

    Args:
        ranks: the others.
        arguments: see `ModelRunner`.
    """

    def __init__(self, ranks: Ranks, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ranks = ranks

    @property
    def num_ranks(self) -> int:
        """How many processes share the model."""
        return self.ranks.size

    def close(self) -> None:
        """Ends the other ranks too."""
        super().close()
        self.ranks.close()

    def forward(
        self, rows: Sequence[ForwardRow], logits_index: Sequence[int] | None = None, *, lasting: bool = True
    ) -> torch.Tensor:
        """See `ModelRunner.forward`.

        Raises:
            EngineDeadError: a rank ended, or the forward was interrupted: the ranks no longer agree on what runs.
        """
        with _deferred_interrupt():
            self.ranks.order("forward", list(rows), [0])  # the other ranks' logits are not used
            try:
                return super().forward(rows, logits_index, lasting=lasting)
            except BaseException as error:
                raise self.ranks.broken(error) from error


@contextmanager
def _deferred_interrupt() -> Iterator[None]:
    """Ctrl-C takes effect at the end: a forward that one rank leaves early would be the others' end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    handler = signal.getsignal(signal.SIGINT)
    if handler is None:  # set by other than Python
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received and callable(handler):
            handler(*received[0])
