"""Detects the `HeadSpec` from configuration and tensor shapes. A configuration that contradicts the tensors is an error."""

from __future__ import annotations

from transformers.activations import ACT2FN

from specplug import CheckpointError
from specplug_eagle.checkpoint.config import DraftConfig
from specplug_eagle.checkpoint.keys import refuse_other_methods
from specplug_eagle.checkpoint.refusals import refuse_other_variants
from specplug_eagle.checkpoint.rope import read_rope, read_windows
from specplug_eagle.checkpoint.sizes import (
    EMBEDDING,
    GATE_PROJ,
    O_PROJ,
    OUTPUT,
    Q_PROJ,
    Shapes,
    attention_sizes,
    check_agreement,
    count_layers,
    feature_sizes,
    matrix,
    vocabulary_sizes,
)
from specplug_eagle.head.spec import Family, HeadSpec

_TITLES = {"eagle1": "EAGLE-1", "eagle3": "EAGLE-3"}


def detect(
    config: DraftConfig,
    shapes: Shapes,
    *,
    norm_before_residual: bool | None = None,
    norm_output: bool | None = None,
    rope_theta: float | None = None,
) -> tuple[HeadSpec, tuple[str, ...]]:
    """Detects the draft head of a checkpoint.

    Args:
        config: its configuration.
        shapes: its tensors by canonical name, vocabulary maps included.
        norm_before_residual: the user's override of a flag that tensors do not show.
        norm_output: likewise.
        rope_theta: the user's override of the RoPE base.

    Returns:
        The head, and warnings about what the checkpoint does not determine.

    Raises:
        CheckpointError: another method or variant, or a contradiction; the message names both values.
    """
    refuse_other_methods(shapes)
    refuse_other_variants(config)
    family = _family(config, shapes)
    warnings: list[str] = []
    hidden = matrix(shapes, O_PROJ)[0]
    check_agreement(config, "hidden_size", hidden, f"'{O_PROJ}' has {hidden} rows")
    q_rows, q_columns = matrix(shapes, Q_PROJ)
    wide = 2 * hidden if family == "eagle3" else hidden
    if q_columns != wide:
        raise CheckpointError(
            f"'{Q_PROJ}' takes {q_columns} inputs, but an {_TITLES[family]} layer of hidden size {hidden} takes {wide}"
        )
    heads, kv_heads, head_dim = attention_sizes(config, shapes, q_rows)
    inner = matrix(shapes, GATE_PROJ)[0]
    check_agreement(config, "intermediate_size", inner, f"'{GATE_PROJ}' has {inner} rows")
    num_layers = count_layers(shapes)
    if (stated := config.size("num_hidden_layers")) not in (None, num_layers):
        warnings.append(f"config.json says {stated} draft layers; the checkpoint has {num_layers}, which are used")
    vocab, draft_vocab = vocabulary_sizes(config, shapes)
    num_aux, target_hidden = feature_sizes(config, shapes, family, hidden)
    single = family == "eagle3" and "fc.weight" not in shapes
    before_residual = _norm_before_residual(config, family, norm_before_residual, warnings)
    output = config.switch("norm_output") if norm_output is None else norm_output
    if norm_output is None and output and config.layout != "speculators":
        warnings.append(
            "config.json says norm_output: true, so the next step gets the normed state; in heads of older SpecForge the flag "
            "affects logits only: if acceptance falls after the first token, set norm_output=false"
        )
    act = str(config.layer.get("hidden_act") or config.layer.get("hidden_activation") or "silu")
    if act not in ACT2FN:
        raise CheckpointError(f"config.json: the activation '{act}' (hidden_act) is not known")
    spec = HeadSpec(
        family=family,
        hidden_size=hidden,
        target_hidden_size=target_hidden,
        vocab_size=vocab,
        draft_vocab_size=draft_vocab,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        num_layers=num_layers,
        num_aux_states=num_aux,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        hidden_act=act,
        rope=read_rope(config, head_dim, rope_theta),
        windows=read_windows(config, num_layers),
        single_state=single,
        has_own_embedding=EMBEDDING in shapes,
        has_own_lm_head=OUTPUT in shapes,
        fc_bias="fc.bias" in shapes,
        norm_before_fc="input_norm.weight" in shapes,
        fc_norm="fc_norm.0.weight" in shapes,
        norm_before_residual=before_residual,
        norm_output=bool(output) and family == "eagle3",
        qkv_bias="layers.0.self_attn.q_proj.bias" in shapes,
        o_bias="layers.0.self_attn.o_proj.bias" in shapes,
        mlp_bias="layers.0.mlp.gate_proj.bias" in shapes,
        qk_norm="layers.0.self_attn.q_norm.weight" in shapes,
        normed_layers=family == "eagle1" and "norm.weight" in shapes,
        layer_ids=config.layer_ids if family == "eagle3" and not single else None,
        layout=config.layout,
    )
    _check_norm_flags(config, spec)
    return spec, tuple(warnings)


def _family(config: DraftConfig, shapes: Shapes) -> Family:
    if not any(name.startswith("layers.0.") for name in shapes):
        held = ", ".join(f"'{name}'" for name in sorted(shapes)[:3]) or "no tensors"
        raise CheckpointError(
            f"this is not an EAGLE draft head: it has no attention layer 'layers.0' (it contains {held}, …)"
        )
    first, final = "layers.0.input_layernorm.weight" in shapes, "norm.weight" in shapes
    if "layers.0.hidden_norm.weight" in shapes or matrix(shapes, Q_PROJ)[1] == 2 * matrix(shapes, O_PROJ)[0]:
        family: Family = "eagle3"
    elif "fc.weight" not in shapes:
        raise CheckpointError(
            "this is not an EAGLE draft head: it has neither 'fc.weight' nor 'layers.0.hidden_norm.weight' (for a whole "
            "language model use the method draft_model)"
        )
    else:
        family = "eagle1"
        if first != final:
            held, absent = ("layers.0.input_layernorm", "norm") if first else ("norm", "layers.0.input_layernorm")
            raise CheckpointError(
                f"this variant of EAGLE-1 is not supported: it has '{held}.weight', but no '{absent}.weight'"
            )
    stated = str(config.flag("speculators_model_type") or "")
    expected = {"eagle3": "eagle3", "eagle": "eagle1", "eagle1": "eagle1"}.get(stated)
    if expected not in (None, family):
        raise CheckpointError(
            f"config.json says speculators_model_type '{stated}', but the tensors are those of {_TITLES[family]}"
        )
    return family


def _norm_before_residual(config: DraftConfig, family: Family, override: bool | None, warnings: list[str]) -> bool:
    if family != "eagle3":
        return False
    if override is not None:
        return override
    stated = config.switch("norm_before_residual")
    if stated is None and config.layout == "speculators":
        warnings.append(
            "config.json does not say norm_before_residual; true is assumed, as vLLM does for this format: if no drafts are "
            "accepted, set norm_before_residual=false"
        )
        return True
    return bool(stated)


def _check_norm_flags(config: DraftConfig, spec: HeadSpec) -> None:
    """Checks the flags that tensors show."""
    if spec.family == "eagle1":
        return
    held = {"norm_before_fc": spec.norm_before_fc, "fc_norm": spec.fc_norm}
    if all(held.values()):
        raise CheckpointError(
            "the checkpoint has both 'input_norm.weight' and 'fc_norm.0.weight'; a head has one of them"
        )
    for name, tensor in (("norm_before_fc", "input_norm.weight"), ("fc_norm", "fc_norm.0.weight")):
        stated = config.switch(name)
        if stated is None and name == "fc_norm":
            stated = config.switch("use_aux_norm")
        if stated is not None and stated != held[name]:
            raise CheckpointError(
                f"config.json says {name}: {str(stated).lower()}, but the checkpoint has "
                f"{'' if held[name] else 'no '}'{tensor}'"
            )
