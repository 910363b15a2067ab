"""Writes the goldens of the other layouts and variants, by equations alone: no cache, no modules, nothing of specplug.

    python make_plain.py      # needs torch and safetensors; writes the cases beside this script

For every row t and draft step s the whole sequence is computed anew: fused features up to t, then the s hidden states that
the steps before fed back, each beside its (teacher-forced) token. Row t of step s is defined for t < T - s.

A case is a checkpoint with the names and the configuration of its layout, and beside its folder NAME.safetensors: `features`
[T, n·Ht], `ids` int64 [T] (each feature's next token), `logits` [steps, T, draft vocabulary], and what is borrowed of the
target.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TOKENS, STEPS, VOCABULARY, DRAFT = 8, 4, 40, 24
HIDDEN, INNER, HEADS, KV_HEADS = 16, 24, 4, 2
Weights = dict[str, torch.Tensor]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def linear(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def rotate(x: torch.Tensor, position: int, how: dict[str, Any]) -> torch.Tensor:
    """One head's vector [D] at one position, pair by pair: element i turns with element i + dim/2."""
    dim = int(len(x) * how.get("partial", 1.0))
    theta = how.get("theta", 10000.0)
    if "dynamic" in how:
        factor, longest = how["dynamic"]
        length = max(position + 1, longest)
        theta *= (factor * length / longest - (factor - 1)) ** (dim / (dim - 2))
    out = x.clone()
    for i in range(dim // 2):
        angle = position * theta ** (-2 * i / dim)
        cosine, sine = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cosine - x[i + dim // 2] * sine
        out[i + dim // 2] = x[i + dim // 2] * cosine + x[i] * sine
    return out


def attention(x: torch.Tensor, weights: Weights, layer: str, how: dict[str, Any]) -> torch.Tensor:
    """Causal attention over a sequence [N, width] at positions 0 … N - 1."""
    count, dim = len(x), how.get("head_dim", HIDDEN // HEADS)
    query = linear(x, weights, f"{layer}.self_attn.q_proj").view(count, HEADS, dim)
    key = linear(x, weights, f"{layer}.self_attn.k_proj").view(count, -1, dim)
    value = linear(x, weights, f"{layer}.self_attn.v_proj").view(count, -1, dim)
    share = HEADS // key.shape[1]
    window = how.get("window", 10**6)
    out = torch.zeros(count, HEADS, dim)
    for head in range(HEADS):
        queries = torch.stack([rotate(query[i, head], i, how) for i in range(count)])
        keys = torch.stack([rotate(key[i, head // share], i, how) for i in range(count)])
        for i in range(count):
            first = max(0, i - window + 1)
            scores = keys[first : i + 1] @ queries[i] / math.sqrt(dim)
            out[i, head] = scores.softmax(-1) @ value[first : i + 1, head // share]
    return linear(out.reshape(count, HEADS * dim), weights, f"{layer}.self_attn.o_proj")


def mlp(x: torch.Tensor, weights: Weights, layer: str) -> torch.Tensor:
    gate = linear(x, weights, f"{layer}.mlp.gate_proj")
    gate = gate / (1 + torch.exp(-gate))
    return linear(gate * linear(x, weights, f"{layer}.mlp.up_proj"), weights, f"{layer}.mlp.down_proj")


def ordinary(h: torch.Tensor, weights: Weights, layer: str, how: dict[str, Any]) -> torch.Tensor:
    h = h + attention(rms(h, weights[f"{layer}.input_layernorm.weight"]), weights, layer, how)
    return h + mlp(rms(h, weights[f"{layer}.post_attention_layernorm.weight"]), weights, layer)


def eagle1(embedded: torch.Tensor, features: torch.Tensor, weights: Weights, how: dict[str, Any]) -> Any:
    h = linear(torch.cat((embedded, features), -1), weights, "fc")
    for index in range(how.get("layers", 1)):
        layer = f"layers.{index}"
        if index == 0 and not how.get("normed"):
            h = h + attention(h, weights, layer, how)
            h = h + mlp(rms(h, weights[f"{layer}.post_attention_layernorm.weight"]), weights, layer)
        else:
            h = ordinary(h, weights, layer, how)
    if how.get("normed"):
        h = rms(h, weights["norm.weight"])
    return h, h


def eagle3(embedded: torch.Tensor, g: torch.Tensor, weights: Weights, how: dict[str, Any]) -> Any:
    normed = rms(g, weights["layers.0.hidden_norm.weight"])
    x = torch.cat((rms(embedded, weights["layers.0.input_layernorm.weight"]), normed), -1)
    h = (normed if how.get("before_residual") else g) + attention(x, weights, "layers.0", how)
    h = h + mlp(rms(h, weights["layers.0.post_attention_layernorm.weight"]), weights, "layers.0")
    for index in range(1, how.get("layers", 1)):
        h = ordinary(h, weights, f"layers.{index}", how)
    y = rms(h, weights["norm.weight"])
    return y, y if how.get("output") else h


def fuse(features: torch.Tensor, weights: Weights, how: dict[str, Any]) -> torch.Tensor:
    if how["family"] == "eagle1" or how.get("single"):
        return features
    if how.get("each_norm"):
        parts = features.chunk(3, -1)
        features = torch.cat([rms(part, weights[f"fc_norm.{i}.weight"]) for i, part in enumerate(parts)], -1)
    return linear(features, weights, "fc")


def unroll(features: torch.Tensor, ids: torch.Tensor, weights: Weights, how: dict[str, Any]) -> torch.Tensor:
    step = eagle1 if how["family"] == "eagle1" else eagle3
    fused, embed = fuse(features, weights, how), weights["embed_tokens.weight"]
    logits = torch.zeros(STEPS, TOKENS, len(weights["lm_head.weight"]))
    for t in range(TOKENS):
        hidden = fused[: t + 1]
        for s in range(min(STEPS, TOKENS - t)):
            output, feedback = step(embed[ids[: t + 1 + s]], hidden, weights, how)
            logits[s, t] = output[-1] @ weights["lm_head.weight"].T
            hidden = torch.cat((hidden, feedback[-1:]))
    return logits


def weights_for(how: dict[str, Any], generator: torch.Generator) -> Weights:
    target, dim, three = (
        how.get("target_hidden", HIDDEN),
        how.get("head_dim", HIDDEN // HEADS),
        how["family"] == "eagle3",
    )
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (how.get("draft", VOCABULARY), HIDDEN),
    }
    if not how.get("single"):
        shapes["fc.weight"] = (HIDDEN, 3 * target if three else 2 * HIDDEN)
    if how.get("fc_bias"):
        shapes["fc.bias"] = (HIDDEN,)
    if how.get("each_norm"):
        shapes |= {f"fc_norm.{i}.weight": (target,) for i in range(3)}
    if three or how.get("normed"):
        shapes["norm.weight"] = (HIDDEN,)
    for index in range(how.get("layers", 1)):
        layer, width = f"layers.{index}", 2 * HIDDEN if three and index == 0 else HIDDEN
        kv = how.get("kv_heads", KV_HEADS) * dim
        shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        if three or index or how.get("normed"):
            shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        if three and index == 0:
            shapes[f"{layer}.hidden_norm.weight"] = (HIDDEN,)
        for name, rows, columns in (("q", HEADS * dim, width), ("k", kv, width), ("v", kv, width)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, columns)
            if how.get("qkv_bias"):
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * dim)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    # Without a final norm the states of EAGLE-1 grow from step to step, and rounding errors with them.
    scale = 0.3 if three or how.get("normed") else 0.15
    weights = {}
    for name, shape in shapes.items():
        noise = scale * torch.randn(shape, generator=generator)
        weights[name] = 1 + noise if "norm" in name else noise
    if how.get("draft"):
        members = torch.randperm(VOCABULARY, generator=generator)[:DRAFT].sort().values
        weights["d2t"] = members - torch.arange(DRAFT)
        weights["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, members, value=True)
    return weights


Names = Callable[[str], str]
IDS = "eagle_aux_hidden_state_layer_ids"


def midlayer(name: str) -> str:
    return name.replace("layers.0.", "midlayer.")


def sglang(name: str) -> str:
    for index, depth in enumerate(("low", "mid", "high")):
        name = name.replace(f"fc_norm.{index}", f"aux_norm_{depth}")
    return midlayer(name).replace("layers.1.input_layernorm", "layers.1.hidden_norm")


# Each case: the equations' switches, the configuration's changes, the names in the file, the tensors that the file lacks.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Names, set[str]]] = {
    "eagle1_authors": (
        {"family": "eagle1", "theta": 500000.0},
        {"rope_theta": 500000.0, "bias": False},
        lambda name: name,
        {"lm_head.weight"},
    ),
    "eagle1_biases": (
        {"family": "eagle1", "fc_bias": True, "qkv_bias": True, "kv_heads": HEADS},
        {"num_key_value_heads": None, "qkv_bias": True},
        lambda name: name,
        {"lm_head.weight", "embed_tokens.weight"},
    ),
    "eagle1_two_layers": (
        {"family": "eagle1", "layers": 2},
        {"num_hidden_layers": 2},
        lambda name: f"module.{name}",
        {"lm_head.weight"},
    ),
    "eagle1_mistral": (
        {"family": "eagle1", "normed": True},
        {"model_type": "mistral"},
        lambda name: name.replace("fc.", "eagle_linear."),
        {"lm_head.weight", "embed_tokens.weight"},
    ),
    "eagle1_wrapped": (
        {"family": "eagle1"},
        {"wrap": {"model_type": "eagle", "eagle_fc_bias": False, "truncated_vocab_size": VOCABULARY}},
        lambda name: f"model.{name}" if name.startswith("layers") else name,
        set(),
    ),
    "eagle3_authors": (
        {"family": "eagle3", "draft": DRAFT},
        {"draft_vocab_size": DRAFT},
        midlayer,
        {"embed_tokens.weight"},
    ),
    "eagle3_wide_target": (
        {"family": "eagle3", "draft": DRAFT, "target_hidden": 24},
        {"draft_vocab_size": DRAFT, "target_hidden_size": 24},
        midlayer,
        set(),
    ),
    "eagle3_sglang": (
        {"family": "eagle3", "draft": DRAFT, "each_norm": True, "layers": 2, "output": True, "head_dim": 6},
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": DRAFT,
            "head_dim": 6,
            "num_hidden_layers": 2,
            "norm_output": True,
            "use_aux_norm": True,
            IDS: [1, 3, 4],
        },
        sglang,
        set(),
    ),
    "eagle3_modelopt": (
        {"family": "eagle3", "theta": 1e6},
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": None,
            "rope_theta": 1e6,
            "eagle_config": {
                IDS: [1, 3, 4],
                "use_aux_hidden_state": True,
                "use_input_layernorm_in_first_layer": True,
                "use_last_layernorm": True,
                "use_mtp_layernorm": False,
                "next_layer_regular": True,
                "parallel_draft_step": 1,
            },
        },
        lambda name: f"model.{name}",
        {"embed_tokens.weight", "lm_head.weight"},
    ),
    "eagle3_single_state": (
        {"family": "eagle3", "single": True},
        {"eagle_config": {"use_aux_hidden_state": False, "use_last_layernorm": True}},
        lambda name: name,
        {"embed_tokens.weight", "lm_head.weight"},
    ),
    "eagle3_window": (
        {"family": "eagle3", "draft": DRAFT, "window": 3, "before_residual": True},
        {
            "speculators": {"draft_vocab_size": DRAFT, "norm_before_residual": True, IDS: [2, 4, 5]},
            "layer_types": ["sliding_attention"],
            "sliding_window": 3,
        },
        lambda name: name,
        set(),
    ),
    "eagle3_dynamic": (
        {"family": "eagle3", "dynamic": (4.0, 5)},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 5},
        midlayer,
        {"embed_tokens.weight"},
    ),
    "eagle3_partial_rotary": (
        {"family": "eagle3", "partial": 0.5, "theta": 20000.0},
        {"rope_scaling": {"type": "mrope", "rope_theta": 20000.0}, "partial_rotary_factor": 0.5},
        midlayer,
        {"embed_tokens.weight"},
    ),
}


def make(name: str, folder: Path) -> None:
    how, changes, rename, absent = CASES[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    weights = weights_for(how, generator)
    width = how.get("target_hidden", HIDDEN) * (1 if how["family"] == "eagle1" or how.get("single") else 3)
    features = torch.randn(TOKENS, width, generator=generator)
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    golden = {"features": features, "ids": ids, "logits": unroll(features, ids, weights, how)}
    golden |= {f"target.{key.removesuffix('.weight')}": weights[key] for key in absent}
    config = {**CONFIG, **changes}
    if "wrap" in config:
        config = {**config.pop("wrap"), "model": config}
    if "speculators" in config:
        config = {"speculators_model_type": "eagle3", **config.pop("speculators"), "transformer_layer_config": config}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({rename(key): value for key, value in weights.items() if key not in absent}, folder / "model.safetensors")
    save_file(golden, folder.with_suffix(".safetensors"))


if __name__ == "__main__":
    for case in CASES:
        make(case, Path(__file__).parent / case)
