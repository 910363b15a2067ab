"""The inputs of a forward from the host, in one asynchronous copy to the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_PADDING = (0, 0, -1, 0)  # token, position, slot and logits index of a padded token; attention ignores it
_USUAL_PLAN = 4096  # elements that are always copied


def staged_length(width: int, plan_length: int) -> int:
    """int32 elements that a forward of `width` tokens takes in a buffer."""
    return 8 * width + plan_length


def stage(
    longs: Sequence[Sequence[int]], plan: Sequence[list[int] | np.ndarray], device: torch.device
) -> list[torch.Tensor]:
    """Copies four lists of integers and the attention plan into a new tensor.

    Args:
        longs: ids, positions, write slots and logits index.
        plan: int32, in pieces.
        device: the destination.

    Returns:
        The lists as int64 tensors and the plan as an int32 one; all share one piece of memory.
    """
    sizes = [len(values) for values in longs]
    length = 2 * sum(sizes) + sum(len(piece) for piece in plan)
    host = torch.empty(length, dtype=torch.int32, pin_memory=device.type == "cuda")
    array = host.numpy()
    array[: 2 * sum(sizes)].view(np.int64)[:] = [value for values in longs for value in values]
    _write(array, 2 * sum(sizes), plan)
    return split_buffer(host.to(device, non_blocking=True), sizes)


def split_buffer(buffer: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The parts of a filled buffer: one int64 tensor per size, and the rest as it is."""
    total = sum(sizes)
    return [*buffer[: 2 * total].view(torch.int64).split(list(sizes)), buffer[2 * total :]]


def _write(array: np.ndarray, at: int, pieces: Sequence[list[int] | np.ndarray]) -> int:
    """Writes pieces one after the other; returns where they end."""
    for piece in pieces:
        array[at : at + len(piece)] = piece
        at += len(piece)
    return at


class StagedInputs:
    """The buffer on a GPU from which captured forwards read, and the pinned memory from which it is filled.

    A graph begins with the copy of what most batches need; only a longer plan costs a separate copy. `write` waits until the
    last forward has read the pinned memory, which is the first thing that it does.

    Args:
        most_tokens: of a forward.
        longest_plan: int32 elements.
        device: the GPU.
    """

    def __init__(self, most_tokens: int, longest_plan: int, device: torch.device) -> None:
        length = staged_length(most_tokens, longest_plan)
        self._buffer = torch.zeros(length, dtype=torch.int32, device=device)
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=True)
        self._ints = self._host.numpy()
        self._longs = self._ints.view(np.int64)
        self._longest_plan = longest_plan
        self._read = torch.cuda.Event()

    def tensors(self, width: int) -> list[torch.Tensor]:
        """The lists of `width` numbers and the plan, as a forward reads them."""
        *longs, plan = split_buffer(self._buffer, [width] * 4)
        return [*longs, plan[: self._longest_plan]]

    def copy(self, width: int) -> None:
        """Copies what most forwards of `width` tokens need; to be captured before them."""
        length = 8 * width + _USUAL_PLAN
        self._buffer[:length].copy_(self._host[:length], non_blocking=True)

    def write(self, longs: Sequence[Sequence[int]], width: int, plan: Sequence[list[int] | np.ndarray]) -> bool:
        """Writes four lists, each padded to `width`, and the plan; False if they do not fit. See `stage`."""
        if sum(len(piece) for piece in plan) > self._longest_plan:
            return False
        self._read.synchronize()
        flat: list[int] = []
        for values, padding in zip(longs, _PADDING, strict=True):
            flat += values
            flat += [padding] * (width - len(values))
        self._longs[: 4 * width] = flat
        usual, end = 8 * width + _USUAL_PLAN, _write(self._ints, 8 * width, plan)
        if end > usual:
            self._buffer[usual:end].copy_(self._host[usual:end], non_blocking=True)
        return True

    def mark_read(self) -> None:
        """To be called after the forward that reads what was written."""
        self._read.record(torch.cuda.current_stream(self._buffer.device))
