"""A small module with one attention layer, as a speculator compiles it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 16, 64


class Layer(nn.Module):
    """Attention between two linear layers, scaled by what is given."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Linear(WIDTH, HEADS * DIM)
        self.pair = nn.Linear(WIDTH, 2 * KV_HEADS * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH)
        self.scale = scale
        self.requires_grad_(False)

    def step(self, batch: Any, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query = self.query(states).view(-1, HEADS, DIM).transpose(0, 1)
        key, value = self.pair(states).view(-1, 2 * KV_HEADS, DIM).transpose(0, 1).chunk(2)
        turned = query + batch.positions[:, None].to(query.dtype).cos()
        attended = batch.attend(0, turned, key, value, 0.25, 6)
        return self.out(attended.reshape(-1, HEADS * DIM)) * self.scale, states.square()

    def looking(self, batch: Any, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (states * 2 if bool(states.sum() > 0) else states,)
