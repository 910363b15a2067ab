"""The runners of ranks, and the first one's KV cache: what the first rank's do, the others' do too."""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from specplug.model.kv_cache import KVCache
from specplug.model.parallel.group import share_ids, worst_of_ranks
from specplug.model.parallel.ranks import Ranks
from specplug.model.pending import PendingTokens
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


class ReceivedTokens(PendingTokens):
    """What stands for the first rank's `PendingTokens` on another rank.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(1, 1, device)

    def fill(self, ids: torch.Tensor) -> None:
        """Replaces all ids [T] of a forward by the first rank's."""
        share_ids(ids)


class RankRunner(ModelRunner):
    """A rank's part of the target.

    Args:
        rank: its number.
        num_ranks: how many there are.
        arguments: see `ModelRunner`.
    """

    def __init__(self, rank: int, num_ranks: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._place = rank, num_ranks

    @property
    def rank(self) -> int:
        """See `ModelRunner.rank`."""
        return self._place[0]

    @property
    def num_ranks(self) -> int:
        """See `ModelRunner.num_ranks`."""
        return self._place[1]

    def worst(self, value: float) -> float:
        """See `ModelRunner.worst`."""
        return worst_of_ranks(value)


class LeadingRunner(RankRunner):
    """The first rank's part of the target. Drafting, verification and sampling happen on this rank alone.

    Args:
        ranks: the others.
        arguments: see `ModelRunner`.
    """

    def __init__(self, ranks: Ranks, *arguments: Any) -> None:
        super().__init__(0, ranks.size, *arguments)
        self.ranks = ranks
        weakref.finalize(self, ranks.close)  # an engine that nobody closed, at the latest when Python ends

    def close(self) -> None:
        """Ends the other ranks too."""
        super().close()
        self.graphs = None  # they hold the group's sums, and a group that is in use does not end
        self.ranks.close()

    def forward(
        self, rows: Sequence[ForwardRow], logits_index: Sequence[int] | None = None, *, lasting: bool = True
    ) -> torch.Tensor:
        """See `ModelRunner.forward`.

        Raises:
            EngineDeadError: a rank ended, or the forward was interrupted: the ranks no longer agree on what runs.
        """
        with _deferred_interrupt():
            index = None if logits_index is None else list(logits_index)
            self.ranks.order("forward", list(rows), index)  # the same logits: ranks take the same CUDA graph
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
