"""The buffers of verification, for probabilities and noise: allocated once, counted in the memory plan."""

from __future__ import annotations

import torch


class Workspace:
    """Rows of probabilities and noise, reused in every step.

    Args:
        num_rows: the most distributions of a step.
        vocab_size: their width.
        device: of the buffers.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._probs = torch.empty(num_rows, vocab_size, device=device, dtype=torch.float32)
        self._noise = torch.empty(num_rows, vocab_size, device=device, dtype=torch.float32)
        self._taken = {"probs": 0, "noise": 0}

    @staticmethod
    def planned_bytes(num_rows: int, vocab_size: int) -> int:
        """Bytes of the buffers."""
        return 2 * num_rows * vocab_size * torch.float32.itemsize

    def begin_step(self) -> None:
        """Makes all rows available again."""
        self._taken = {"probs": 0, "noise": 0}

    def probs(self, num_rows: int) -> torch.Tensor:
        """float32 [num_rows, V] to write probabilities to."""
        return self._take("probs", self._probs, num_rows)

    def noise(self, num_rows: int) -> torch.Tensor:
        """float32 [num_rows, V] to write noise to."""
        return self._take("noise", self._noise, num_rows)

    def _take(self, name: str, buffer: torch.Tensor, num_rows: int) -> torch.Tensor:
        start = self._taken[name]
        if start + num_rows > len(buffer):  # a verifier requested the same entries twice
            return torch.empty(num_rows, buffer.shape[1], device=buffer.device, dtype=torch.float32)
        self._taken[name] = start + num_rows
        return buffer[start : start + num_rows]
