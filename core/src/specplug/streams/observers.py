"""What sees the progress of all requests."""

from __future__ import annotations

from typing import Protocol

from specplug.request import Request


class StreamObserver(Protocol):
    """Sees the progress of all requests. Called in the engine's thread, so it must be quick, and may not raise."""

    def add(self, request: Request, num_tokens: int, seconds: float) -> None:
        """One sequence has new tokens.

        Args:
            request: the sequence.
            num_tokens: how many; 0 if it failed.
            seconds: since its last tokens; for the first ones, since its arrival.
        """

    def end(self, request: Request) -> None:
        """One sequence has ended, for any reason."""
