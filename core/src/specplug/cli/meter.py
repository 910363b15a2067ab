"""Timing one streamed completion."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from specplug.llm import StreamedPiece
    from specplug.stats import SpeculationStats


@attrs.define
class Meter:
    """Counts and times the pieces of one completion.

    Attributes:
        token_ids: all tokens.
        num_first: tokens of the first piece, which the prompt's step gave.
        finish_reason: why it ended; None while it is generated.
        metrics: what speculation did for it; None before the first piece.
    """

    token_ids: list[int] = attrs.field(factory=list)
    num_first: int = 0
    finish_reason: str | None = None
    metrics: SpeculationStats | None = None
    _started: float = attrs.field(factory=time.perf_counter)
    _first: float = 0.0
    _last: float = 0.0

    def add(self, piece: StreamedPiece) -> None:
        """Counts a piece."""
        self._last = time.perf_counter()
        if not self.token_ids:
            self._first, self.num_first = self._last, len(piece.token_ids)
        self.token_ids += piece.token_ids
        self.finish_reason = piece.finish_reason
        self.metrics = piece.metrics

    @property
    def num_decoded(self) -> int:
        """Tokens that came after the first piece."""
        return len(self.token_ids) - self.num_first

    @property
    def seconds_to_first(self) -> float:
        """From the start to the first piece: the time of the prompt."""
        return self._first - self._started

    @property
    def decode_seconds(self) -> float:
        """From the first piece to the last."""
        return self._last - self._first

    @property
    def tokens_per_second(self) -> float | None:
        """Decoded tokens by their time, without the prompt's; None if everything came at once."""
        return self.num_decoded / self.decode_seconds if self.num_decoded and self.decode_seconds else None
