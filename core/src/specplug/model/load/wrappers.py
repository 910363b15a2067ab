"""Models that join a text model with others (images, sound): the class that runs one, and its text part alone.

The model's own class runs, so that what it does to a text (positions in three dimensions, say) is done as it does it. The
modules that a text never reaches are its towers: they are found by running one, and taken out before weights are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch


def auto_class(config: Any) -> Any:
    """The Auto class of Transformers that makes a generating model of a configuration; None if none does."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    is_wrapper = "text_config" in (getattr(config, "sub_configs", None) or {})
    return AutoModelForMultimodalLM if is_wrapper and type(config) in AutoModelForMultimodalLM._model_mapping else None


def make_model(config: Any, dtype: torch.dtype, attention: str, *, trust_remote_code: bool = False) -> Any:
    """A model with new weights, its towers included."""
    from transformers import AutoModelForCausalLM

    maker = auto_class(config) or AutoModelForCausalLM
    return maker.from_config(config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code)


def find_towers(model: Any, layers: Iterable[str], used: Collection[int]) -> tuple[str, ...]:
    """The modules next to the decoder, or to what holds it, of which a text used nothing.

    Args:
        model: the model.
        layers: the names of the decoder layers.
        used: `id` of every module and parameter that a forward over text used.
    """
    holders = {name.rpartition(".")[0] for name in layers}
    ancestors = {".".join(holder.split(".")[:depth]) for holder in holders for depth in range(holder.count(".") + 1)}
    towers = []
    for ancestor in sorted(ancestors):
        for name, child in model.get_submodule(ancestor).named_children():
            parts = [id(part) for part in (*child.modules(), *child.parameters())]
            if any(True for _ in child.parameters()) and used.isdisjoint(parts):  # type: ignore[attr-defined]
                towers.append(f"{ancestor}.{name}" if ancestor else name)
    return tuple(towers)


def drop_towers(model: torch.nn.Module, towers: Iterable[str]) -> None:
    """Takes modules out of a model; their attributes become None."""
    for tower in towers:
        parent, _, name = tower.rpartition(".")
        setattr(model.get_submodule(parent), name, None)


def text_part(config: Any, towers: Collection[str]) -> Any:
    """What has `from_pretrained` for a configuration, without these towers."""
    from transformers import AutoModelForCausalLM

    maker = auto_class(config) or AutoModelForCausalLM
    if not towers:
        return maker
    whole: Any = maker._model_mapping[type(config)]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, *args, **kwargs)
        drop_towers(self, towers)

    return type(whole.__name__, (whole,), {"__init__": init, "__module__": whole.__module__})
