"""Token ids that are on the device and not yet on the host: a forward can take them from there before the host knows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class PendingRow:
    """Some ids of one row that the host may not know yet.

    Args:
        tokens: whose entries they are.
        first: the first entry.
        count: how many.

    Attributes:
        ids: the ids once they have been read; one outside the vocabulary is replaced, as the forward has replaced it.
        error: what was wrong with them; None if nothing was, or before they have been read.
    """

    def __init__(self, tokens: PendingTokens, first: int, count: int) -> None:
        self._tokens = tokens
        self.first = first
        self._count = count
        self.ids: list[int] | None = None
        self.error: str | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def placeholders(self) -> range:
        """What stands for them among the tokens of a forward."""
        return range(-1 - self.first, -1 - self.first - self._count, -1)

    def fill(self, ids: torch.Tensor) -> None:
        """See `PendingTokens.fill`."""
        self._tokens.fill(ids)

    def read(self) -> list[int]:
        """The ids; waits until the device has them."""
        if self.ids is None:
            self._tokens.settle()
            assert self.ids is not None
        return self.ids


class UpcomingTokens:
    """The next tokens of a row, which a verification on the device decides: accepted drafts, and the token after them.

    `len` is how many there are at most. See `ProposalRow.upcoming`.

    Args:
        row: how many drafts were accepted, then the tokens, of which only those before and after them count.
    """

    def __init__(self, row: PendingRow) -> None:
        self._row = row
        self.count_entry = row.first

    def __len__(self) -> int:
        """How many there are at most."""
        return len(self._row) - 1

    @property
    def placeholders(self) -> range:
        """What stands for them among the tokens of a `ForwardRow`."""
        return self._row.placeholders[1:]

    @property
    def error(self) -> str | None:
        """What was wrong with them, once they have been read."""
        return self._row.error

    def read(self) -> list[int]:
        """Those that came; waits until the device has decided."""
        count, *tokens = self._row.read()
        return tokens[: 1 + count]

    def fill(self, ids: torch.Tensor) -> None:
        """Replaces placeholders among the ids [T] of a forward, in place; nobody waits."""
        self._row.fill(ids)


class PendingTokens:
    """A buffer of ids on the device. In the tokens of a `ForwardRow`, -1 - i stands for the buffer's entry i.

    Args:
        size: entries.
        vocab_size: an id that is not below it is replaced, since an embedding must not be read beyond its end.
        device: of the buffer. On a CPU there is nothing to gain; tests use it.
        share: gives other processes that run the same forward its ids.
    """

    def __init__(
        self,
        size: int,
        vocab_size: int,
        device: torch.device,
        share: Callable[[torch.Tensor], None] = lambda ids: None,
    ) -> None:
        self._share = share
        self._most = vocab_size - 1
        self._ids = torch.zeros(size, dtype=torch.int64, device=device)
        self.device = self._ids.device  # with its index, as other tensors there have it
        self._host = torch.zeros(size, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._rows: list[PendingRow] = []
        self._is_fetched = True

    def takes(self, tokens: torch.Tensor) -> bool:
        """Whether a tensor of ids can stay on the device: [rows, K] of integers, there already."""
        return (
            tokens.device == self.device
            and tokens.dtype in (torch.int64, torch.int32)
            and tokens.dim() == 2
            and 0 < tokens.numel() <= len(self._ids)
        )

    def put(self, tokens: torch.Tensor, lengths: Sequence[int]) -> list[PendingRow]:
        """Takes in the first `lengths[r]` ids of each row of [R, K]; what was there before is read first."""
        self.settle()
        rows, width = tokens.shape
        own = self._ids[: rows * width]
        own.view(rows, width).copy_(tokens)
        self._is_fetched = False
        self._rows = [PendingRow(self, row * width, length) for row, length in enumerate(lengths)]
        return self._rows

    def fetch(self) -> None:
        """Has the ids copied to the host once the device comes to it; nobody waits. Best called when the device is busy."""
        if self._is_fetched:
            return
        self._is_fetched = True
        length = max(row.first + len(row) for row in self._rows)
        self._host[:length].copy_(self._ids[:length], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.device))

    def settle(self) -> None:
        """Gives every row its ids; waits until the device has them."""
        self.fetch()
        rows, self._rows = self._rows, []
        if not rows:
            return
        if self._copied is not None:
            self._copied.synchronize()
        found = self._host[: max(row.first + len(row) for row in rows)].tolist()
        for row in rows:
            ids = found[row.first : row.first + len(row)]
            if ids and not (min(ids) >= 0 and max(ids) <= self._most):
                bad = next(token for token in ids if not 0 <= token <= self._most)
                row.error = f"draft token {bad} is not an id of the target's vocabulary of {self._most + 1}"
                ids = [min(max(token, 0), self._most) for token in ids]
            row.ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def at(self, entries: torch.Tensor, otherwise: int) -> torch.Tensor:
        """The ids at some entries of the buffer, on the device; `otherwise` where an entry is negative."""
        return torch.where(entries < 0, otherwise, self._ids[entries.clamp(min=0)].clamp_(0, self._most))

    def fill(self, ids: torch.Tensor) -> None:
        """Replaces the placeholders among the ids [T] of a forward, in place; a CUDA graph can hold it."""
        entries = self._ids[(-1 - ids).clamp_(min=0)].clamp_(0, self._most)
        ids.copy_(torch.where(ids < 0, entries, ids))
        self._share(ids)
