"""Tensor names: those of every layout are mapped to those of the speculators format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from specplug import CheckpointError

_PREFIXES = ("module.", "model.", "draft_model.", "eagle_layer.", "eagle_module.")
_RENAMED = (
    (re.compile(r"^midlayer\."), "layers.0."),
    (re.compile(r"^layers\.([1-9]\d*)\.hidden_norm\."), r"layers.\1.input_layernorm."),  # SGLang's second layer
    (re.compile(r"^aux_norm_low\."), "fc_norm.0."),
    (re.compile(r"^aux_norm_mid\."), "fc_norm.1."),
    (re.compile(r"^aux_norm_high\."), "fc_norm.2."),
    (re.compile(r"^(eagle_linear|fusion_fc)\."), "fc."),
)
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^verifier_(lm_head|norm)\.")
_REFUSED = (
    (r"(^|\.)mask_hidden", "a parallel-drafting (P-EAGLE) head"),
    (r"self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)\.", "a head with multi-head latent attention (MLA)"),
    (r"^(blocks|medusa_head|medusa_heads|heads)\.", "a Medusa-like head"),
    (r"^(input_norm1|input_norm2)\.", "a MiniCPM EAGLE head"),
    (
        r"^(embed_layernorm|post_embedding_layernorm|lm_head_layernorm)\.",
        "an EAGLE-1 head with extra layer norms (HASS)",
    ),
    (r"\.mlp\.(experts|gate|router|shared_expert\w*)\.", "a head with a mixture of experts"),
    (r"\.(qkv_proj|gate_up_proj)\.", "a head with fused projections"),
    (r"\.(weight_scale|input_scale|weight_scale_inv|qweight|qzeros|scales|weight_packed)$", "a quantised head"),
    (r"^(eh_proj|enorm|hnorm|layers\.0\.(eh_proj|enorm|hnorm))\.", "an MTP layer"),
)


def refuse_other_methods(names: Iterable[str]) -> None:
    """Raises `CheckpointError` if canonical names show a method or variant that is known but not implemented."""
    for name in names:
        for pattern, what in _REFUSED:
            if re.search(pattern, name):
                raise CheckpointError(f"this is {what}, which is not supported (it contains '{name}')")


def canonical_name(name: str) -> str:
    """Returns a tensor's name in the speculators format."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def canonical_names(names: Iterable[str]) -> Mapping[str, str]:
    """Returns the file's tensor names by canonical name, without those that are known to be unused.

    Raises:
        CheckpointError: two tensors have the same canonical name.
    """
    found: dict[str, str] = {}
    for name in names:
        canonical = canonical_name(name)
        if _IGNORED.search(canonical):
            continue
        if canonical in found:
            raise CheckpointError(f"the checkpoint has '{canonical}' twice, as '{found[canonical]}' and as '{name}'")
        found[canonical] = name
    return found
