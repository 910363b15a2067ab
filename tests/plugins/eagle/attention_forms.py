"""Two ways to attend: a whole sequence at once as in training, and a cache that grows and is cropped as in drafting."""

from __future__ import annotations

import torch

from specplug_eagle.head import DraftHead


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, allowed: torch.Tensor
) -> torch.Tensor:
    """[heads, T, D] over [kv_heads, N, D] where `allowed` [T, N] → [T, heads, D]."""
    share = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(share, 0), value.repeat_interleave(share, 0)
    scores = (query @ key.transpose(1, 2)) * scaling
    return (scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value).transpose(0, 1)


class UnrolledAttend:
    """Rows of one sequence, all draft steps of all rows side by side.

    Row t of step s sees the first step's keys up to t, and of every later step only its own row's.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.step = 0
        self.keys: dict[int, list[torch.Tensor]] = {}
        self.values: dict[int, list[torch.Tensor]] = {}

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        keys, values = self.keys.setdefault(layer, []), self.values.setdefault(layer, [])
        keys.append(key)
        values.append(value)
        row = torch.arange(self.length)
        allowed = torch.cat([row[:, None] >= row, *[torch.eye(self.length, dtype=torch.bool)] * self.step], 1)
        if window is not None:
            at = torch.cat([row + step for step in range(self.step + 1)])
            allowed &= row[:, None] + self.step - at < window
        return _attention(query, torch.cat(keys, 1), torch.cat(values, 1), scaling, allowed)


class CachedAttend:
    """Keys and values of one sequence, in order."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def crop(self, length: int) -> None:
        self.keys = {layer: key[:, :length] for layer, key in self.keys.items()}
        self.values = {layer: value[:, :length] for layer, value in self.values.items()}

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        if layer in self.keys:
            key = torch.cat((self.keys[layer], key), 1)
            value = torch.cat((self.values[layer], value), 1)
        self.keys[layer], self.values[layer] = key, value
        at = torch.arange(key.shape[1])
        ahead = at[-query.shape[1] :, None] - at
        allowed = (ahead >= 0) & (ahead < (window or 10**6))
        return _attention(query, key, value, scaling, allowed)


def unrolled_logits(head: DraftHead, features: torch.Tensor, ids: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Per draft step, logits of all rows for which it is defined: [T - step, draft vocabulary]."""
    length = len(ids)
    attend, hidden, all_logits = UnrolledAttend(length), head.fuse(features), []
    for step in range(steps):
        attend.step = step
        tokens = torch.cat((ids[step:], ids.new_zeros(step)))
        result = head(head.embed(tokens), hidden, torch.arange(length) + step, attend)
        all_logits.append(head.logits(result.output)[: length - step])
        hidden = result.feedback
    return all_logits


def incremental_logits(
    head: DraftHead, features: torch.Tensor, ids: torch.Tensor, steps: int, chunk: int
) -> list[torch.Tensor]:
    """The same by drafting after every chunk of true features, and cropping the drafted entries away."""
    length = len(ids)
    rows: list[dict[int, torch.Tensor]] = [{} for _ in range(steps)]
    attend, fused = CachedAttend(), head.fuse(features)
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        result = head(head.embed(ids[start:end]), fused[start:end], torch.arange(start, end), attend)
        for offset, one in enumerate(head.logits(result.output)):
            rows[0][start + offset] = one
        hidden = result.feedback[-1:]
        for step in range(1, min(steps, length - end + 1)):
            at = torch.tensor([end - 1 + step])
            result = head(head.embed(ids[at]), hidden, at, attend)
            rows[step][end - 1] = head.logits(result.output)[0]
            hidden = result.feedback
        attend.crop(end)
    return [torch.stack([values[row] for row in sorted(values)]) for values in rows]
