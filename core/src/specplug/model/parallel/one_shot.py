"""Sums of small tensors over the GPUs of one machine in one kernel each, through memory that all of them read.

NCCL takes 15 µs to sum the states of one token; most of it is its protocol. PyTorch's one-shot sum (`symm_mem`) copies a
rank's part to memory that the others can read, waits until all have, and adds what it reads from each, in the order of ranks.
"""

from __future__ import annotations

import os
import threading
import time

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

LARGEST_BYTES = 1 << 20
"""Of a tensor that is summed at one shot; see docs/scaling.md for the times."""
_DTYPES = (torch.bfloat16, torch.float32)  # what PyTorch's kernel has
_ALIGNMENT = 16
_CLOSE_SECONDS = 5.0
_POLL_SECONDS = 0.01


class OneShotSums:
    """The memory through which the ranks add small tensors.

    All ranks make one at the same time.

    Args:
        device: of this rank.

    Raises:
        RuntimeError: the GPUs cannot share memory.
    """

    def __init__(self, device: torch.device) -> None:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not used, and not every machine can
        group = dist.group.WORLD
        assert group is not None
        self._group = group.group_name
        self._device = device
        self._memory = symmetric.empty(LARGEST_BYTES, dtype=torch.uint8, device=device)
        self._handle = symmetric.rendezvous(self._memory, self._group)
        size = symmetric.get_signal_pad_size() // torch.int32.itemsize
        pads = [self._handle.get_signal_pad(rank, (size,), torch.int32) for rank in range(group.size())]
        self._own_signals, self._other_signals = pads.pop(group.rank()), pads
        self._side = torch.cuda.Stream(device)
        self._releasing: threading.Thread | None = None
        self._is_closed = False
        with torch.cuda.stream(self._side):
            self._own_signals.fill_(0)  # loads the kernel: `release` must not, while another one waits
        torch.cuda.synchronize(device)

    def takes(self, part: torch.Tensor) -> bool:
        """Whether a tensor can be summed this way."""
        size = part.nbytes
        return part.is_cuda and part.dtype in _DTYPES and 0 < size <= LARGEST_BYTES and size % _ALIGNMENT == 0

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """A tensor's sum over all ranks, with the same bits on each."""
        place = self._memory[: part.nbytes].view(part.dtype).view(part.shape)
        total: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(place, part.contiguous(), "sum", self._group)
        return total

    def release(self, seconds: float) -> None:
        """Ends sums that wait for a rank which has ended, for some seconds or until `close`; what they give is meaningless.

        A sum waits for a signal from every other rank, and until its own have been taken. Both are written here.
        """
        self._releasing = threading.Thread(target=self._release, args=(seconds,), daemon=True)
        self._releasing.start()

    def _release(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with torch.cuda.stream(self._side):
            while time.monotonic() < end and not self._is_closed:
                self._own_signals.fill_(1)
                for signals in self._other_signals:
                    signals.fill_(0)
                self._side.synchronize()

    def close(self) -> None:
        """Waits until no sum is left to be released."""
        if self._releasing is None:
            return
        main, end = torch.cuda.current_stream(self._device), time.monotonic() + _CLOSE_SECONDS
        while not main.query() and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        self._is_closed = True
        self._releasing.join()
