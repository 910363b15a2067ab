"""Which parts of a model every rank holds, by Transformers' own tensor parallel plan (`base_model_tp_plan`)."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from specplug.contract.resources import KVLayer
from specplug.errors import ConfigurationError

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
# Styles under which a rank holds a part of the parameters; the others leave them whole.
_SPLIT = frozenset(
    {
        "colwise",
        "colwise_rep",
        "colwise_gather_output",
        "rowwise",
        "rowwise_rep",
        "rowwise_split_input",
        "packed_colwise",
        "packed_rowwise",
    }
)
_LOCAL_HEADS = frozenset({"colwise", "packed_colwise"})
_KEY_PROJECTIONS = frozenset({"k_proj", "kv_b_proj", "qkv_proj", "query_key_value"})
_ATTENTION = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise", "sinks": "colwise"}
WHOLE = "replicate"


@attrs.frozen
class ShardPlan:
    """The plan of a model.

    Embedding and output layer are whole on every rank, whatever the model's plan says: speculators call them through
    `TargetModel.embed` and `logits` on the first rank alone, where a sum over ranks would wait for ever.

    Attributes:
        rules: names with `*` for layer numbers → Transformers' style.
        expert_rules: the same for experts of which every rank has some, where the model has no rules to split each of them.
        num_bytes: bytes of all parameters under each rule.
    """

    rules: Mapping[str, str] = attrs.field(factory=dict)
    expert_rules: Mapping[str, str] = attrs.field(factory=dict)
    num_bytes: Mapping[str, int] = attrs.field(factory=dict)

    @property
    def split_bytes(self) -> int:
        """Bytes of the parameters of which every rank holds a part."""
        return sum(
            size for name, size in self.num_bytes.items() if name in self.expert_rules or self.rules[name] in _SPLIT
        )

    @property
    def splits_heads(self) -> bool:
        """Whether every rank attends with its own KV heads, and so caches only these."""
        return any(
            name.rpartition(".")[2] in _KEY_PROJECTIONS and style in _LOCAL_HEADS for name, style in self.rules.items()
        )

    def weight_bytes(self, total: int, size: int) -> int:
        """Bytes of the weights that one of `size` ranks holds."""
        return total - self.split_bytes + -(-self.split_bytes // size)

    def kv_layers(self, layers: tuple[KVLayer, ...], size: int) -> tuple[KVLayer, ...]:
        """What the KV cache of one of `size` ranks stores per token."""
        if not self.splits_heads:
            return layers
        return tuple(attrs.evolve(layer, num_heads=layer.num_heads // size) for layer in layers)

    def whole(self, *names: str) -> ShardPlan:
        """The plan in which every rank has all of these modules and of what is in them."""
        kept = {
            rule: WHOLE for rule in self.rules if any(rule == name or rule.startswith(f"{name}.") for name in names)
        }
        return attrs.evolve(self, rules={**self.rules, **kept})


WHOLE_MODEL = ShardPlan()


def shard_plan(model: Any) -> ShardPlan:
    """The plan of a model on the meta device; without rules if Transformers has none for it.

    A model that has rules for its experts alone gets the usual ones for attention: heads split over the ranks.
    """
    given, experts = ({**(getattr(model, name, None) or {})} for name in ("tp_plan", "ep_plan"))
    names = {wildcards(name) for name, _ in (*model.named_modules(), *model.named_parameters())}
    rules = {name: style if "*" in name else WHOLE for name, style in given.items() if name in names}
    experts = {name: style for name, style in experts.items() if name in names and name not in rules}
    if experts and not any("*" in name for name in rules):
        rules |= {name: _ATTENTION[name.rpartition(".")[2]] for name in names if _is_projection(name)}
    num_bytes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        rule = wildcards(name)
        rule = rule if rule in rules or rule in experts else rule.rpartition(".")[0]
        if rule in rules or rule in experts:
            num_bytes[rule] += parameter.numel() * parameter.element_size()
    return ShardPlan(rules, experts, dict(num_bytes))


def _is_projection(name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return last in _ATTENTION and owner.endswith("_attn")


def check_ranks(size: int, device: torch.device, *, is_quantised: bool) -> None:
    """Checks that a target can be split over `size` ranks here.

    Raises:
        ConfigurationError: there are fewer GPUs, the weights are quantised, or a package is missing.
    """
    if size == 1:
        return
    asked = f"tensor_parallel_size={size}"
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigurationError(
            f"{asked} needs accelerate, with which Transformers loads a part of each weight: pip install 'specplug[parallel]'"
        )
    if is_quantised:
        raise ConfigurationError(
            f"{asked}: quantised weights cannot be split yet; take a checkpoint that is not quantised"
        )
    if device.type == "cuda" and torch.cuda.device_count() < (device.index or 0) + size:
        raise ConfigurationError(
            f"{asked} from {device} on needs {size} GPUs, and PyTorch sees {torch.cuda.device_count()}; lower it"
        )
    if device.type == "cpu" and torch.cuda.is_available():
        raise ConfigurationError(f"{asked} on the CPU: set CUDA_VISIBLE_DEVICES='', Transformers would take the GPU")


def wildcards(name: str) -> str:
    """`model.layers.3.mlp` → `model.layers.*.mlp`."""
    return _NUMBER.sub(".*", name)
