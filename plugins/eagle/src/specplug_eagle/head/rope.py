"""Rotary position embeddings of the draft layers, half-split as in Llama."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specplug_eagle.head.spec import RopeSpec


class RotaryEmbedding(nn.Module):
    """Cosines and sines for token positions.

    With `dynamic` scaling a token at position p is rotated as the last token of a sequence of p + 1 tokens, which is what
    decoding token by token does. So a row depends neither on other rows nor on how its prompt was chunked.

    Args:
        spec: the settings.
        head_dim: width of a head.
    """

    inverse: torch.Tensor

    def __init__(self, spec: RopeSpec, head_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.rotary_dim = int(head_dim * spec.partial_rotary_factor)
        self._head_dim = head_dim
        inverse, self.attention_scaling = self._initial_frequencies()
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions int64 [T] → cosine and sine, each [T, rotary_dim], computed in float32; YaRN's factor is in them."""
        is_dynamic = self.spec.rope_type == "dynamic"
        frequencies = self._dynamic_frequencies(positions) if is_dynamic else self.inverse.to(positions.device)
        angles = positions[:, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(dtype), (angles.sin() * self.attention_scaling).to(dtype)

    def _dynamic_frequencies(self, positions: torch.Tensor) -> torch.Tensor:
        longest, dim = self.spec.max_position_embeddings, self.rotary_dim
        factor = float(self.spec.parameters["factor"])
        stretch = factor * (positions[:, None] + 1).clamp(min=longest).double() / longest - (factor - 1)
        base = self.spec.theta * stretch ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
        return (base**-exponents).float()

    def _initial_frequencies(self) -> tuple[torch.Tensor, float]:
        spec, dim = self.spec, self.rotary_dim
        if spec.rope_type in ("default", "dynamic"):
            return 1.0 / spec.theta ** (torch.arange(0, dim, 2, device="cpu", dtype=torch.long).float() / dim), 1.0
        config = LlamaConfig(
            hidden_size=self._head_dim,
            num_attention_heads=1,
            head_dim=self._head_dim,
            max_position_embeddings=spec.max_position_embeddings,
            rope_parameters={
                **spec.parameters,
                "rope_type": spec.rope_type,
                "rope_theta": spec.theta,
                "partial_rotary_factor": spec.partial_rotary_factor,
            },
        )
        inverse, scaling = ROPE_INIT_FUNCTIONS[spec.rope_type](config, torch.device("cpu"))
        return inverse, float(scaling)


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotates [heads, T, D] by [T, rotary_dim]; dimensions beyond rotary_dim are unchanged."""
    dim = cosine.shape[-1]
    rotated, rest = states[..., :dim], states[..., dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
