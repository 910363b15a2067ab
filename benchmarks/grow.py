"""Grows a trained Llama without changing its function: the cost of a bigger model, the acceptance of the trained one.

    python benchmarks/grow.py tiny 256M --out build/grown-256m [--dtype bfloat16]
    python benchmarks/grow.py tiny --out build/wider --hidden-size 384 --num-layers 14

A preset names all sizes; an option overrides one of them, and what neither names stays the source's. From `tiny`:

    preset  layers  hidden  intermediate  query heads  key/value heads  parameters
    33M         12     512         1,248            8                2   33.0 million
    256M        24   1,024         2,560           16                4  255.9 million

How the function is kept:

- Width: the residual stream gets new channels that stay exactly zero. RMSNorm weights are multiplied by √(H/H′) and
  epsilon by H/H′, as the mean of squares now runs over more channels.
- Heads: every source head keeps its dimension and attends to its own key/value head, which is copied where the new
  groups are smaller. What new heads and new intermediate channels compute meets zero columns in the output projections.
- Depth: extra layers, spread evenly between the source's, have random weights and zero output projections.

Only the output projections' new parts and the embedding's new columns are zero; every other new weight is random, as in
a fresh model, and all is stored and computed densely.

Boundary b of the residual stream enters layer b. The source's boundary b is the grown model's b · L′ // L: the source's
values in the first H channels, zeros in the others, and so for the final norm's output. `growth.json` beside the weights
lists them as `boundaries`. A speculator that taps the target must pin its layers through this list: its defaults move.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from specplug.tiny import resolve_model

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOKENIZER_FILES = ("*token*.json", "tokenizer.model", "vocab*", "merges.txt", "chat_template*")


class GrowthError(ValueError):
    """A source that cannot be grown, or sizes that cannot hold it."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama that growing may change."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int

    @classmethod
    def from_config(cls, config: Any) -> Sizes:
        heads = config.num_attention_heads, config.num_key_value_heads
        return cls(config.hidden_size, config.num_hidden_layers, config.intermediate_size, *heads)


@dataclass(frozen=True)
class Growth:
    """What was written, as `growth.json` says it: tied parameters count once, boundaries are what `map_boundaries` says."""

    parameters: int
    dtype: str
    boundaries: tuple[int, ...]
    source: Sizes
    grown: Sizes


PRESETS = {"33M": Sizes(512, 12, 1248, 8, 2), "256M": Sizes(1024, 24, 2560, 16, 4)}


def map_boundaries(source_layers: int, num_layers: int) -> tuple[int, ...]:
    """For each boundary of the source, the grown model's; for each layer of the source (all but the last), its index."""
    return tuple(boundary * num_layers // source_layers for boundary in range(source_layers + 1))


def place_heads(source: Sizes, grown: Sizes) -> tuple[list[int], list[tuple[int, int]]]:
    """Where the source's heads go.

    Returns:
        The new index of each source query head, and pairs of a source key/value head and its new index, one for each
        of the new groups that its queries need.

    Raises:
        GrowthError: the new groups cannot hold the source's.
    """
    old_group = source.num_attention_heads // source.num_key_value_heads
    new_group = grown.num_attention_heads // grown.num_key_value_heads
    copies = math.ceil(old_group / new_group)  # new groups per source group
    if copies * source.num_key_value_heads > grown.num_key_value_heads:
        raise GrowthError(
            f"{grown.num_key_value_heads} key/value heads of {new_group} query heads each cannot hold the source's "
            f"{source.num_key_value_heads} of {old_group}; any multiple of {source.num_key_value_heads} can"
        )
    queries = []
    for head in range(source.num_attention_heads):
        key, member = divmod(head, old_group)
        queries.append((key * copies + member // new_group) * new_group + member % new_group)
    return queries, [(key, key * copies + copy) for key in range(source.num_key_value_heads) for copy in range(copies)]


def grow(
    source_folder: str | Path,
    out_folder: str | Path,
    *,
    hidden_size: int,
    num_layers: int,
    intermediate_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    dtype: str = "bfloat16",
    seed: int = 0,
    device: str = "cpu",
) -> Growth:
    """Writes a bigger Llama that computes what the source computes, with its tokenizer and `growth.json`.

    In float32 the logits equal the source's to rounding. In bfloat16 the RMSNorm weights are rounded once more, unless
    √(H/H′) is a power of two. Vocabulary, head dimension, context length and tying stay the source's.

    Args:
        source_folder: a local Llama checkpoint, or `tiny`.
        out_folder: made if missing; files of the same names are replaced.
        hidden_size: a multiple of num_attention_heads; like all other sizes, at least the source's.
        num_layers: decoder layers.
        intermediate_size: channels within the MLP.
        num_attention_heads: query heads, a multiple of num_key_value_heads.
        num_key_value_heads: a multiple of the source's always fits.
        dtype: of the weights, "bfloat16" or "float32".
        seed: of the random weights; torch's global generator is left as it was.
        device: where the model is made; a large one takes minutes on a CPU.

    Raises:
        GrowthError: the source cannot be grown, or the sizes cannot hold it.
    """
    grown_sizes = Sizes(hidden_size, num_layers, intermediate_size, num_attention_heads, num_key_value_heads)
    source_folder, out_folder = Path(resolve_model(str(source_folder))), Path(out_folder)
    config = read_config(source_folder)
    sizes = Sizes.from_config(config)
    _check_sizes(sizes, grown_sizes)
    if dtype not in DTYPES:
        raise GrowthError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if out_folder.resolve() == source_folder.resolve():
        raise GrowthError("the grown model would replace its source; choose another folder")
    source = AutoModelForCausalLM.from_pretrained(source_folder, dtype=torch.float32).to(device)
    changes = asdict(grown_sizes)
    config.update({"num_hidden_layers": changes.pop("num_layers"), **changes})
    config.rms_norm_eps *= sizes.hidden_size / hidden_size
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _copy_model(source, model, sizes, grown_sizes)
    model.generation_config = source.generation_config
    model.to(DTYPES[dtype]).save_pretrained(out_folder)
    for path in (path for pattern in TOKENIZER_FILES for path in source_folder.glob(pattern)):
        shutil.copy(path, out_folder / path.name)
    growth = Growth(model.num_parameters(), dtype, map_boundaries(sizes.num_layers, num_layers), sizes, grown_sizes)
    (out_folder / "growth.json").write_text(json.dumps(asdict(growth), indent=2) + "\n", encoding="utf-8")
    return growth


def read_config(folder: Path) -> Any:
    """The configuration of a Llama that can be grown."""
    if not (folder / "config.json").is_file():
        raise GrowthError(f"{folder} holds no config.json; the source is a local checkpoint's folder, or 'tiny'")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "llama":
        raise GrowthError(f"the source is of type '{config.model_type}'; only 'llama' can be grown")
    if config.attention_bias or config.mlp_bias:
        raise GrowthError("the source has biases in its projections; only a Llama without them can be grown")
    return config


def _check_sizes(source: Sizes, grown: Sizes) -> None:
    for name, least in asdict(source).items():
        if getattr(grown, name) < least:
            raise GrowthError(f"{name} is {getattr(grown, name)}; the source has {least}, and growing removes nothing")
    for name, divisor in (("num_attention_heads", "num_key_value_heads"), ("hidden_size", "num_attention_heads")):
        value, unit = getattr(grown, name), getattr(grown, divisor)
        if value % unit:
            raise GrowthError(f"{name} is {value}; it must be a multiple of {divisor}, {unit}")
    place_heads(source, grown)


@torch.no_grad()
def _copy_model(source: Any, model: Any, sizes: Sizes, grown: Sizes) -> None:
    """Writes the source into a fresh model, and zeros where anything else could reach the residual stream."""
    width = sizes.hidden_size
    model.lm_head.weight[:, :width] = source.lm_head.weight  # before the embedding, which it may be tied to
    model.model.embed_tokens.weight.zero_()[:, :width] = source.model.embed_tokens.weight
    _copy_norm(source.model.norm, model.model.norm)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    queries, pairs = place_heads(sizes, grown)
    for index, old in zip(map_boundaries(sizes.num_layers, grown.num_layers)[:-1], source.model.layers, strict=True):
        new = model.model.layers[index]
        _copy_norm(old.input_layernorm, new.input_layernorm)
        _copy_norm(old.post_attention_layernorm, new.post_attention_layernorm)
        _copy_attention(old.self_attn, new.self_attn, queries, pairs)
        for name in ("gate_proj", "up_proj", "down_proj"):
            small = getattr(old.mlp, name).weight
            getattr(new.mlp, name).weight[: small.shape[0], : small.shape[1]] = small


def _copy_attention(old: Any, new: Any, queries: list[int], pairs: list[tuple[int, int]]) -> None:
    heads, width = (-1, old.head_dim), old.q_proj.in_features
    old_keys, new_keys = map(list, zip(*pairs, strict=True))
    new.q_proj.weight.unflatten(0, heads)[queries, :, :width] = old.q_proj.weight.unflatten(0, heads)
    new.k_proj.weight.unflatten(0, heads)[new_keys, :, :width] = old.k_proj.weight.unflatten(0, heads)[old_keys]
    new.v_proj.weight.unflatten(0, heads)[new_keys, :, :width] = old.v_proj.weight.unflatten(0, heads)[old_keys]
    new.o_proj.weight.unflatten(1, heads)[:width, queries] = old.o_proj.weight.unflatten(1, heads)


def _copy_norm(old: Any, new: Any) -> None:
    new.weight[: len(old.weight)] = old.weight * math.sqrt(len(old.weight) / len(new.weight))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a Llama checkpoint, or tiny")
    parser.add_argument("preset", nargs="?", choices=list(PRESETS), help="sizes by name")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    for field in fields(Sizes):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=None, metavar="N")
    args = parser.parse_args()
    disable_progress_bar()
    try:
        base = PRESETS.get(args.preset) or Sizes.from_config(read_config(Path(resolve_model(args.source))))
        chosen = {name: value for name, value in vars(args).items() if name in asdict(base) and value is not None}
        growth = grow(args.source, args.out, **{**asdict(base), **chosen}, dtype=args.dtype)
    except GrowthError as error:
        parser.error(str(error))
    print(f"{args.out}: {growth.parameters / 1e6:.1f} million parameters, {growth.dtype}")
    for name, value in asdict(growth.grown).items():
        print(f"  {name:<20} {getattr(growth.source, name):>6} -> {value}")
    print(f"  {'boundaries':<20} {', '.join(f'{old}->{new}' for old, new in enumerate(growth.boundaries))}")


if __name__ == "__main__":
    main()
