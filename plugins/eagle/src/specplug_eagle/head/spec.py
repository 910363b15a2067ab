"""The specification of a draft head: sizes, variants and RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

Family = Literal["eagle1", "eagle3"]
RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
Layout = Literal["flat", "eagle_config", "speculators", "wrapped"]


@attrs.frozen
class RopeSpec:
    """Rotary position embedding of the draft layers; it is independent of the target's.

    Attributes:
        theta: the base.
        rope_type: how frequencies are scaled.
        parameters: the scaling's own settings (`factor`, `low_freq_factor`, `beta_fast`, …), under the names of
            Transformers' `rope_parameters`.
        partial_rotary_factor: the part of each head that is rotated.
        max_position_embeddings: the context length that `dynamic` and `yarn` scale from.
    """

    theta: float = 10000.0
    rope_type: RopeType = "default"
    parameters: Mapping[str, Any] = attrs.field(factory=dict)
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int = 2048


@attrs.frozen
class HeadSpec:
    """A draft head: one of EAGLE-1 (which EAGLE-2 shares), arXiv 2401.15077, or EAGLE-3, arXiv 2503.01840.

    Attributes:
        family: `eagle1` (fuses embedding and feature before the layers) or `eagle3` (attends over both, concatenated).
        hidden_size: width of the draft's own states.
        target_hidden_size: width of the target's.
        vocab_size: of the target, and of the embedding.
        draft_vocab_size: rows of the draft's output.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        intermediate_size: width of the MLP.
        num_layers: draft layers, nearly always one.
        num_aux_states: target states that `fc` fuses; 1 where the final state is used instead.
        rms_norm_eps: of every norm.
        hidden_act: the MLP's activation, by Transformers' name.
        rope: rotary settings.
        windows: per layer the sliding window in tokens (key j is visible to query i iff 0 ≤ i − j < window), or None.
        single_state: an EAGLE-3 head without `fc` that reads the target's final normed state.
        has_own_embedding: whether the head has `embed_tokens`; else it borrows the target's.
        has_own_lm_head: whether the head has `lm_head`; else it borrows the target's.
        fc_bias: `fc` has a bias.
        norm_before_fc: EAGLE-3: one RMSNorm over the concatenated target states.
        fc_norm: EAGLE-3: one RMSNorm for each target state.
        norm_before_residual: EAGLE-3: the residual starts from the normed hidden state.
        norm_output: EAGLE-3: the next step gets the normed output.
        qkv_bias: q, k and v have biases.
        o_bias: the attention's output has a bias.
        mlp_bias: the MLP has biases.
        qk_norm: queries and keys are normed per head before RoPE, as in Qwen3.
        normed_layers: EAGLE-1 in the Mistral style: layer 0 has an input norm, and a final norm precedes both logits
            and the fed-back feature.
        layer_ids: the target layer ids as the checkpoint states them; see `layer_ids.resolve_layer_ids`.
        layout: the configuration's layout; the meaning of `layer_ids` depends on it.
    """

    family: Family
    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_layers: int = 1
    num_aux_states: int = 3
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope: RopeSpec = attrs.field(factory=RopeSpec)
    windows: tuple[int | None, ...] = attrs.field()
    single_state: bool = False
    has_own_embedding: bool = False
    has_own_lm_head: bool = True
    fc_bias: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    normed_layers: bool = False
    layer_ids: tuple[int, ...] | None = None
    layout: Layout = "speculators"

    @windows.default
    def _full_attention(self) -> tuple[int | None, ...]:
        return (None,) * self.num_layers

    @property
    def uses_final_state(self) -> bool:
        """Whether the head reads the target's state after its final norm, and not states of inner layers."""
        return self.family == "eagle1" or self.single_state

    @property
    def feature_size(self) -> int:
        """Width of the input of `DraftHead.fuse`: all target states of one token, concatenated."""
        return self.num_aux_states * self.target_hidden_size

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The head's parameters by canonical name, linear weights as [out, in], without vocabulary maps."""
        hidden, heads, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if self.has_own_embedding:
            shapes["embed_tokens.weight"] = (self.vocab_size, hidden)
        if self.has_own_lm_head:
            shapes["lm_head.weight"] = (self.draft_vocab_size, hidden)
        if not self.single_state:
            shapes["fc.weight"] = (hidden, 2 * hidden if self.family == "eagle1" else self.feature_size)
        if self.fc_bias:
            shapes["fc.bias"] = (hidden,)
        if self.norm_before_fc:
            shapes["input_norm.weight"] = (self.feature_size,)
        if self.fc_norm:
            shapes |= {f"fc_norm.{i}.weight": (self.target_hidden_size,) for i in range(self.num_aux_states)}
        if self.family == "eagle3" or self.normed_layers:
            shapes["norm.weight"] = (hidden,)
        for index in range(self.num_layers):
            layer = f"layers.{index}."
            wide = 2 * hidden if self.family == "eagle3" and index == 0 else hidden
            if self.family == "eagle3" or index > 0 or self.normed_layers:
                shapes[layer + "input_layernorm.weight"] = (hidden,)
            if self.family == "eagle3" and index == 0:
                shapes[layer + "hidden_norm.weight"] = (hidden,)
            shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
            linear = {
                "self_attn.q_proj": (heads, wide, self.qkv_bias),
                "self_attn.k_proj": (kv, wide, self.qkv_bias),
                "self_attn.v_proj": (kv, wide, self.qkv_bias),
                "self_attn.o_proj": (hidden, heads, self.o_bias),
                "mlp.gate_proj": (self.intermediate_size, hidden, self.mlp_bias),
                "mlp.up_proj": (self.intermediate_size, hidden, self.mlp_bias),
                "mlp.down_proj": (hidden, self.intermediate_size, self.mlp_bias),
            }
            for name, (rows, columns, bias) in linear.items():
                shapes[f"{layer}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{layer}{name}.bias"] = (rows,)
            if self.qk_norm:
                shapes[layer + "self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[layer + "self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes
