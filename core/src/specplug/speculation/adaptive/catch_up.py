"""What it takes a speculator to catch up with tokens that it has not processed."""

from __future__ import annotations

from specplug.speculation.adaptive.settings import AdaptiveSettings

_ALIKE = 0.1
"""Sizes of calls that differ by less, relative to their mean, do not tell a cost per call from one per token."""


class CatchUpCost:
    """Seconds of a call that catches up: some for the call, and some for each token.

    On a CPU the tokens count; on a GPU it is the launches of one more forward, so that rows had better catch up together. The
    line is fitted to the latest calls. While they were about equally large, the cost is taken for proportional.

    Args:
        settings: how fast it learns.

    Attributes:
        per_call: seconds of a call.
        per_token: seconds of each token.
        open_call: tokens and seconds of a call that has not been settled.
    """

    def __init__(self, settings: AdaptiveSettings) -> None:
        self._keeps = settings.catch_up_memory
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0
        self.per_call = 0.0
        self.per_token = 0.0
        self.open_call: tuple[int, float] | None = None

    @property
    def is_known(self) -> bool:
        """Whether a call was timed."""
        return self._weight > 0.0 or self.open_call is not None

    def seconds(self, tokens: int) -> float:
        """The expected time of a call with so many tokens."""
        return self.per_call + self.per_token * tokens if tokens else 0.0

    def share(self, tokens: int, together: int) -> float:
        """What of it is due to some of the tokens of a call."""
        return self.seconds(together) * tokens / together if together else 0.0

    def begin(self, tokens: int, seconds: float) -> None:
        """A call returned after so many seconds."""
        self.settle(0.0)
        self.open_call = (tokens, max(seconds, 0.0))

    def settle(self, more: float) -> None:
        """Takes in that call; it took so much more in all."""
        if self.open_call is not None:
            tokens, seconds = self.open_call
            self.open_call = None
            self._observe(tokens, seconds + more)

    def _observe(self, tokens: int, seconds: float) -> None:
        """A call that took much longer than expected counts for less."""
        if expected := self.seconds(tokens):
            seconds = min(seconds, 3.0 * expected)
        self._weight = self._keeps * self._weight + 1.0
        self._tokens = self._keeps * self._tokens + tokens
        self._seconds = self._keeps * self._seconds + seconds
        self._squares = self._keeps * self._squares + tokens * tokens
        self._products = self._keeps * self._products + tokens * seconds
        size, time = self._tokens / self._weight, self._seconds / self._weight
        spread = self._squares / self._weight - size * size
        self.per_token = time / size
        if spread > (_ALIKE * size) ** 2:
            slope = (self._products / self._weight - size * time) / spread
            self.per_token = min(max(slope, 0.0), time / size)
        self.per_call = max(time - self.per_token * size, 0.0)
