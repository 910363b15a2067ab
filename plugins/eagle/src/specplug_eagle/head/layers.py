"""The draft layers: RMSNorm, attention around a given `attend`, and the gated MLP."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from specplug_eagle.head.rope import rotate
from specplug_eagle.head.spec import HeadSpec


class Attend(Protocol):
    """The caller's attention: over a paged cache for drafting, with a dense mask for training."""

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attends with the new tokens, and stores their keys and values if there is a cache.

        Args:
            layer: index of the draft layer.
            query: [heads, T, head_dim], rotated.
            key: [kv_heads, T, head_dim], rotated.
            value: [kv_heads, T, head_dim].
            scaling: what scores are multiplied by.
            window: sliding window in tokens, or None.

        Returns:
            [T, heads, head_dim].
        """
        ...


class RMSNorm(nn.Module):
    """Root mean square norm: normalised in float32, cast back, then weighted."""

    def __init__(
        self, size: int, eps: float, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., size] → [..., size], in the dtype of the states."""
        exact = states if states.dtype == torch.float64 else states.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(states.dtype)


class Attention(nn.Module):
    """Grouped-query attention with RoPE. EAGLE-3's first layer reads embedding and hidden state, concatenated."""

    def __init__(self, spec: HeadSpec, layer: int, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.window = spec.windows[layer]
        wide = 2 * spec.hidden_size if spec.family == "eagle3" and layer == 0 else spec.hidden_size
        rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(wide, rows, bias=spec.qkv_bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(wide, kv_rows, bias=spec.qkv_bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(wide, kv_rows, bias=spec.qkv_bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(rows, spec.hidden_size, bias=spec.o_bias, device=device, dtype=dtype)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps, device=device, dtype=dtype)
            self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps, device=device, dtype=dtype)

    def forward(
        self, states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        """[T, wide] → [T, hidden]."""
        tokens = states.shape[0]
        query = self.q_proj(states).view(tokens, self.num_heads, self.head_dim)
        key = self.k_proj(states).view(tokens, self.num_kv_heads, self.head_dim)
        value = self.v_proj(states).view(tokens, self.num_kv_heads, self.head_dim).transpose(0, 1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query.transpose(0, 1), *rotation)
        key = rotate(key.transpose(0, 1), *rotation)
        attended = attend(self.layer, query, key, value, self.head_dim**-0.5, self.window)
        return self.o_proj(attended.reshape(tokens, self.num_heads * self.head_dim))


class MLP(nn.Module):
    """The gated MLP of Llama."""

    def __init__(self, spec: HeadSpec, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        hidden, inner, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden, inner, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=bias, device=device, dtype=dtype)
        self._activation = F.silu if spec.hidden_act in ("silu", "swish") else ACT2FN[spec.hidden_act]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        return self.down_proj(self._activation(self.gate_proj(states)) * self.up_proj(states))


class DraftLayer(nn.Module):
    """One decoder layer of a draft head, with the norms of its family."""

    def __init__(self, spec: HeadSpec, layer: int, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(spec.hidden_size, spec.rms_norm_eps, device=device, dtype=dtype)

        self.norm_before_residual = spec.norm_before_residual
        self.input_layernorm: RMSNorm | None = None
        self.hidden_norm: RMSNorm | None = None
        if spec.family == "eagle3" or layer > 0 or spec.normed_layers:
            self.input_layernorm = norm()
        if spec.family == "eagle3" and layer == 0:
            self.hidden_norm = norm()
        self.self_attn = Attention(spec, layer, device, dtype)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(spec, device, dtype)

    def forward(
        self,
        hidden: torch.Tensor,
        embeddings: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        """[T, hidden] → [T, hidden]; only EAGLE-3's first layer reads the embeddings [T, hidden]."""
        residual = hidden
        if self.hidden_norm is not None and self.input_layernorm is not None:
            normed = self.hidden_norm(hidden)
            if self.norm_before_residual:
                residual = normed
            states = torch.cat((self.input_layernorm(embeddings), normed), dim=-1)
        else:
            states = hidden if self.input_layernorm is None else self.input_layernorm(hidden)
        hidden = residual + self.self_attn(states, rotation, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
