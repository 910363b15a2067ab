"""Grows an EAGLE-3 head to fit a target that `benchmarks/grow.py` has grown: the bigger head drafts what the small one drafts.

    python benchmarks/grow.py tiny 256M --out build/grown-256m
    python benchmarks/grow_head.py tiny build/grown-256m --out build/grown-256m-head

The head gets the grown target's width, heads and intermediate size, as a head trained for such a target would have. Its
stream is the source's in the first channels and zero in the others, as the target's is; new weights are random where they
meet zeros, and zero where they would write. The layers it taps are mapped through the target's `growth.json`. Heads in the
speculators format with one layer and without embeddings of their own, such as the embedded one, can be grown.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from grow import GrowthError, Sizes, place_heads
from safetensors.torch import load_file, save_file

from specplug.bench.peers import method_model

NORMS = ("layers.0.hidden_norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
LAYER = "layers.0."


def grow_head(head: Path, target: Path, out: Path, seed: int = 0) -> Sizes:
    """Writes the grown head; returns its sizes.

    Args:
        head: the source's folder.
        target: a folder that `grow` has written, from the target that the head was made for.
        out: made if missing.
        seed: of the random weights.

    Raises:
        GrowthError: the head cannot be grown, or the target was not grown.
    """
    if not (target / "growth.json").is_file():
        raise GrowthError(f"{target} holds no growth.json; make it with benchmarks/grow.py")
    growth = json.loads((target / "growth.json").read_text(encoding="utf-8"))
    config = json.loads((head / "config.json").read_text(encoding="utf-8"))
    weights = load_file(head / "model.safetensors")
    layer = config.get("transformer_layer_config", {})
    if layer.get("num_hidden_layers") != 1 or {f"{name}.weight" for name in NORMS} - weights.keys():
        raise GrowthError(f"{head} is no EAGLE-3 head of one layer in the speculators format")
    if layer["hidden_size"] != growth["source"]["hidden_size"]:
        raise GrowthError(
            f"the head is {layer['hidden_size']} wide, the target's source {growth['source']['hidden_size']}"
        )
    source = _head_sizes(layer)
    grown = Sizes(**{**growth["grown"], "num_layers": 1})
    grown = replace(grown, intermediate_size=max(grown.intermediate_size, source.intermediate_size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors = _grow_weights(weights, source, grown, layer["head_dim"])
    ids = config["eagle_aux_hidden_state_layer_ids"]
    config["eagle_aux_hidden_state_layer_ids"] = [growth["boundaries"][boundary] for boundary in ids]
    layer["rms_norm_eps"] *= source.hidden_size / grown.hidden_size
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        layer[name] = getattr(grown, name)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return grown


def _head_sizes(layer: dict[str, Any]) -> Sizes:
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return Sizes(*(layer[name] for name in names))


def _grow_weights(old: dict[str, torch.Tensor], source: Sizes, grown: Sizes, head_dim: int) -> dict[str, torch.Tensor]:
    """The grown tensors, in the source's dtype."""
    width, wider = source.hidden_size, grown.hidden_size
    queries, pairs = place_heads(source, grown)
    old_keys, new_keys = map(list, zip(*pairs, strict=True))
    fresh: dict[str, torch.Tensor] = {}
    for name in NORMS:
        scaled = torch.ones(wider)
        scaled[:width] = old[f"{name}.weight"] * math.sqrt(width / wider)
        fresh[f"{name}.weight"] = scaled
    fresh["fc.weight"] = _blocks(old["fc.weight"], width, torch.zeros(wider, 3 * wider), wider)
    for name, count, places, taken in (
        ("q_proj", grown.num_attention_heads, queries, list(range(source.num_attention_heads))),
        ("k_proj", grown.num_key_value_heads, new_keys, old_keys),
        ("v_proj", grown.num_key_value_heads, new_keys, old_keys),
    ):
        weight = torch.randn(count * head_dim, 2 * wider) * 0.02
        heads = old[f"{LAYER}self_attn.{name}.weight"].float().unflatten(0, (-1, head_dim))[taken]
        shaped = weight.unflatten(0, (count, head_dim))
        for block in range(2):  # the token's embedding, then the hidden state
            columns = slice(block * wider, block * wider + width)
            shaped[places, :, columns] = heads[:, :, block * width : (block + 1) * width]
        fresh[f"{LAYER}self_attn.{name}.weight"] = weight
    output = torch.zeros(wider, grown.num_attention_heads * head_dim)
    heads = old[f"{LAYER}self_attn.o_proj.weight"].float().unflatten(1, (-1, head_dim))
    output.unflatten(1, (grown.num_attention_heads, head_dim))[:width, queries] = heads
    fresh[f"{LAYER}self_attn.o_proj.weight"] = output
    for name in ("gate_proj", "up_proj"):
        weight = torch.randn(grown.intermediate_size, wider) * 0.02
        weight[: source.intermediate_size, :width] = old[f"{LAYER}mlp.{name}.weight"]
        fresh[f"{LAYER}mlp.{name}.weight"] = weight
    down = torch.zeros(wider, grown.intermediate_size)
    down[:width, : source.intermediate_size] = old[f"{LAYER}mlp.down_proj.weight"]
    fresh[f"{LAYER}mlp.down_proj.weight"] = down
    if unknown := sorted(old.keys() - fresh.keys()):
        raise GrowthError(f"the head has a tensor that cannot be grown: '{unknown[0]}'")
    return {name: tensor.to(old[name].dtype).contiguous() for name, tensor in fresh.items()}


def _blocks(old: torch.Tensor, width: int, new: torch.Tensor, wider: int) -> torch.Tensor:
    """Places the columns of several states, one block each, in wider blocks."""
    for block in range(old.shape[1] // width):
        new[: old.shape[0], block * wider : block * wider + width] = old[:, block * width : (block + 1) * width]
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", help="folder of a head, or tiny")
    parser.add_argument("target", type=Path, help="folder of the grown target")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    try:
        sizes = grow_head(Path(method_model("eagle3", args.head)), args.target, args.out)
    except GrowthError as error:
        parser.error(str(error))
    print(f"{args.out}: {sizes.hidden_size} wide, {sizes.num_attention_heads} heads, {sizes.intermediate_size} within")


if __name__ == "__main__":
    main()
