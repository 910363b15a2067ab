"""Training-time test: the head runs on its own output for several steps, for all positions of a text side by side.

Row t of step s stands for drafting after token t + 1: it holds the target's states up to token t, and s drafted steps. It
reads token t + 1 + s (teacher forced) and predicts token t + 2 + s, so its label is the target's distribution at position
t + 1 + s. Of step 0 it sees the keys of rows up to t; of later steps only its own row's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from specplug_eagle.head import DraftHead


class UnrolledAttention:
    """The `Attend` of an unroll over rows of a batch: call the head once for each step, in order.

    Args:
        rows: texts side by side, B.
        length: rows of a text, T.
    """

    def __init__(self, rows: int, length: int) -> None:
        self._shape = rows, length
        self._keys: dict[int, list[torch.Tensor]] = {}
        self._values: dict[int, list[torch.Tensor]] = {}
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Implements `Attend`; tokens are [B · T], text by text."""
        keys, values = self._keys.setdefault(layer, []), self._values.setdefault(layer, [])
        heads, dtype = query.shape[0], value.dtype
        share = heads // key.shape[0]
        keys.append(self._by_row(key.to(dtype)).repeat_interleave(share, dim=1))
        values.append(self._by_row(value).repeat_interleave(share, dim=1))
        attended = F.scaled_dot_product_attention(
            self._by_row(query.to(dtype)),
            torch.cat(keys, dim=2),
            torch.cat(values, dim=2),
            attn_mask=self._mask(len(keys) - 1, window, query.device),
            scale=scaling,
        )
        return attended.transpose(1, 2).reshape(-1, heads, attended.shape[-1])

    def _by_row(self, states: torch.Tensor) -> torch.Tensor:
        """[heads, B · T, D] → [B, heads, T, D]."""
        return states.unflatten(1, self._shape).transpose(0, 1)

    def _mask(self, step: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Which keys of which step each row sees at this step: bool [T, (step + 1) · T]."""
        if (step, window) not in self._masks:
            row = torch.arange(self._shape[1], device=device, dtype=torch.int64)
            own = row[:, None] == row
            parts = [row[:, None] >= row, *[own] * step]
            if window is not None:
                at = [row + past for past in range(step + 1)]
                parts = [part & (row[:, None] + step - key < window) for part, key in zip(parts, at, strict=True)]
            self._masks[step, window] = torch.cat(parts, dim=1)
        return self._masks[step, window]


def unroll(head: DraftHead, features: torch.Tensor, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Runs the head's steps over texts.

    Args:
        head: the head; gradients reach its parameters through all steps.
        features: [B, T, n · hidden] of the target.
        ids: int64 [B, T], the texts.
        steps: how many.

    Returns:
        [steps, B · T, hidden], what `head.logits` takes. Rows whose token lies beyond the text are meaningless.
    """
    rows, length = ids.shape
    attend = UnrolledAttention(rows, length)
    dtype = next(head.parameters()).dtype
    positions = torch.arange(length, device=ids.device, dtype=torch.int64).repeat(rows)
    hidden = head.fuse(features.flatten(0, 1).to(dtype)).to(dtype)
    outputs = []
    for step in range(steps):
        tokens = F.pad(ids[:, 1 + step :], (0, min(1 + step, length)))[:, :length]
        result = head(head.embed(tokens.flatten()).to(dtype), hidden, positions + step, attend)
        hidden = result.feedback.to(dtype)
        outputs.append(result.output)
    return torch.stack(outputs)
