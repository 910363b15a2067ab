"""The sizes of a draft head from the shapes of its tensors, compared with its configuration."""

from __future__ import annotations

from collections.abc import Mapping

from specplug import CheckpointError
from specplug_eagle.checkpoint.config import DraftConfig
from specplug_eagle.head.spec import Family

Shapes = Mapping[str, tuple[int, ...]]
O_PROJ, Q_PROJ, K_PROJ = (f"layers.0.self_attn.{name}_proj.weight" for name in "oqk")
GATE_PROJ = "layers.0.mlp.gate_proj.weight"
EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"


def attention_sizes(config: DraftConfig, shapes: Shapes, q_rows: int) -> tuple[int, int, int]:
    """Heads, key-value heads and head width."""
    heads, head_dim = config.size("num_attention_heads"), config.size("head_dim")
    norm = shapes.get("layers.0.self_attn.q_norm.weight")
    if norm is not None and len(norm) == 1:
        if head_dim not in (None, norm[0]):
            raise CheckpointError(f"config.json says head_dim {head_dim}, but the q_norm has {norm[0]} elements")
        head_dim = norm[0]
    if heads is None:
        if head_dim is None:
            raise CheckpointError("config.json names neither 'num_attention_heads' nor 'head_dim'")
        heads = q_rows // head_dim
    elif head_dim is None:
        head_dim = q_rows // heads
    if heads * head_dim != q_rows:
        raise CheckpointError(
            f"'{Q_PROJ}' has {q_rows} rows, but config.json says {heads} heads of {head_dim}: {heads * head_dim} rows"
        )
    kv_rows = matrix(shapes, K_PROJ)[0]
    kv_heads = config.size("num_key_value_heads") or kv_rows // head_dim
    if kv_heads * head_dim != kv_rows:
        raise CheckpointError(
            f"'{K_PROJ}' has {kv_rows} rows, but config.json says {kv_heads} key-value heads of {head_dim}: "
            f"{kv_heads * head_dim} rows"
        )
    if heads % kv_heads:
        raise CheckpointError(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly")
    return heads, kv_heads, head_dim


def vocabulary_sizes(config: DraftConfig, shapes: Shapes) -> tuple[int, int]:
    """The vocabulary's size and the draft vocabulary's."""
    known: dict[str, int] = {}
    if EMBEDDING in shapes:
        known[f"'{EMBEDDING}' has {{}} rows"] = matrix(shapes, EMBEDDING)[0]
    if "t2d" in shapes:
        known["t2d has {} entries"] = _vector(shapes, "t2d")
    if (stated := config.size("vocab_size")) is not None:
        known["config.json says vocab_size {}"] = stated
    drafted: dict[str, int] = {}
    if OUTPUT in shapes:
        drafted[f"'{OUTPUT}' has {{}} rows"] = matrix(shapes, OUTPUT)[0]
    if "d2t" in shapes:
        drafted["d2t has {} entries"] = _vector(shapes, "d2t")
    for name in ("draft_vocab_size", "truncated_vocab_size"):
        if (stated := config.size(name)) is not None:
            drafted[f"config.json says {name} {{}}"] = stated
    if not known:
        known = {name: size for name, size in drafted.items() if "d2t" not in shapes}
    if not known:
        raise CheckpointError("config.json lacks 'vocab_size', and no tensor tells the size of the vocabulary")
    vocab = _same(known)
    if OUTPUT not in shapes:
        drafted["without lm_head the head's output is the target's: {} tokens"] = vocab
    draft_vocab = _same(drafted) if drafted else vocab
    if draft_vocab > vocab:
        raise CheckpointError(f"the draft vocabulary has {draft_vocab} tokens, the vocabulary only {vocab}")
    if draft_vocab < vocab and "d2t" not in shapes and "t2d" not in shapes:
        raise CheckpointError(
            f"the head's output has {draft_vocab} of the vocabulary's {vocab} tokens, but neither d2t nor t2d says which"
        )
    return vocab, draft_vocab


def feature_sizes(config: DraftConfig, shapes: Shapes, family: Family, hidden: int) -> tuple[int, int]:
    """The number of target states and the target's hidden size."""
    stated = config.size("target_hidden_size")
    if family == "eagle1" or "fc.weight" not in shapes:
        if stated not in (None, hidden):
            raise CheckpointError(
                f"config.json says target_hidden_size {stated}, but this head needs the target's to be its own: {hidden}"
            )
        if family == "eagle3" and config.switch("use_aux_hidden_state") is not False:
            raise CheckpointError("the EAGLE-3 head lacks 'fc.weight', and config.json does not say that it needs none")
        return 1, hidden
    if config.switch("use_aux_hidden_state") is False:
        raise CheckpointError("config.json says use_aux_hidden_state: false, but the checkpoint has 'fc.weight'")
    columns = matrix(shapes, "fc.weight")[1]
    ids = config.layer_ids
    per_state = shapes.get("fc_norm.0.weight")
    if stated is None and per_state is not None and len(per_state) == 1:
        stated = per_state[0]
    elif stated is None and config.layout == "speculators":
        stated = hidden  # null means the same
    if stated is not None:
        count = columns // stated
    elif ids is not None:
        count = len(ids)
    else:
        count = config.size("num_aux_hidden_states") or (3 if columns % 3 == 0 else columns // hidden)
    target_hidden = stated or columns // max(count, 1)
    if not count or count * target_hidden != columns:
        many = "states" if ids is None else f"layer ids ({len(ids)})"
        raise CheckpointError(
            f"'fc.weight' takes {columns} inputs, which no number of target {many} of hidden size {target_hidden} gives"
        )
    if ids is not None and len(ids) != count:
        raise CheckpointError(
            f"'fc.weight' takes {columns} inputs, {count} target states of {target_hidden}, but config.json names "
            f"{len(ids)} layer ids"
        )
    return count, target_hidden


def count_layers(shapes: Shapes) -> int:
    """The number of draft layers, from the tensors."""
    numbers = {int(part[1]) for name in shapes if (part := name.split("."))[0] == "layers" and part[1].isdigit()}
    count = max(numbers) + 1
    if len(numbers) < count:
        missing = min(set(range(count)) - numbers)
        raise CheckpointError(f"the checkpoint holds draft layer {count - 1}, but not layer {missing}")
    return count


def check_agreement(config: DraftConfig, name: str, value: int, evidence: str) -> None:
    """Raises `CheckpointError` if the configuration states another size than a tensor has."""
    if (stated := config.size(name)) not in (None, value):
        raise CheckpointError(f"config.json says {name} {stated}, but {evidence}")


def _same(values: Mapping[str, int]) -> int:
    """The value that all sources agree on; `{}` in a description is replaced by it."""
    (first, size), *others = values.items()
    for text, other in others:
        if other != size:
            raise CheckpointError(f"{first.format(size)}, but {text.format(other)}")
    return size


def matrix(shapes: Shapes, name: str) -> tuple[int, int]:
    """A matrix' rows and columns; `CheckpointError` if it is missing or no matrix."""
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"the draft head lacks '{name}'; the checkpoint is incomplete")
    if len(shape) != 2:
        raise CheckpointError(f"'{name}' has the shape {list(shape)}; a matrix is expected")
    return shape[0], shape[1]


def _vector(shapes: Shapes, name: str) -> int:
    if len(shapes[name]) != 1:
        raise CheckpointError(f"'{name}' has the shape {list(shapes[name])}; a vector is expected")
    return shapes[name][0]
