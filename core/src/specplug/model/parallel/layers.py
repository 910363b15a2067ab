"""A sharded model as plain modules over plain tensors, so that linear layers are packed as always.

Transformers shards with DTensors and replaced forwards, which cost a few microseconds per layer and cannot be packed. What
inference needs of them is one sum over the ranks after attention, after a feed-forward network, and after experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from specplug.model.parallel.group import sum_over_ranks
from specplug.model.parallel.plan import WHOLE, ShardPlan, wildcards

_INPUT_SPLIT = frozenset({"rowwise"})
_ALONE = frozenset({"colwise", WHOLE, "replicated_with_grad_allreduce", "local_params"})
_SUMMED = frozenset({"moe_tp_experts", "all_reduce"})


class SummedLinear(nn.Module):
    """A linear layer of which every rank holds a part of the inputs.

    Args:
        linear: this rank's part, without a bias.
        bias: [out], added after the sum.
    """

    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("bias", bias, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """This rank's part, for code that reads its dtype."""
        return self.linear.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in / ranks] → [..., out]."""
        summed = sum_over_ranks(self.linear(states))
        return summed if self.bias is None else summed + self.bias


class SummedModule(nn.Module):
    """A module whose output is a sum over the ranks, such as a layer of experts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The sum of the ranks' outputs."""
        return sum_over_ranks(self.inner(*args, **kwargs))


def sharding_options(shards: ShardPlan, num_ranks: int) -> dict[str, Any]:
    """The arguments of Transformers' `from_pretrained` that split a model over the ranks of the current process group."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    has_whole = WHOLE in ALL_PARALLEL_STYLES  # without that style, a plan that is given replaces the model's own (5.17)
    rules = {name: style for name, style in shards.rules.items() if style != WHOLE or has_whole}
    options: dict[str, Any] = {"tp_size": num_ranks, "tp_plan": rules}
    if shards.expert_rules:  # every rank runs its experts on the whole batch, and the outputs are summed
        options |= {"ep_size": num_ranks, "ep_plan": dict(shards.expert_rules), "ep_implementation": "all_reduce"}
    return {"distributed_config": DistributedConfig(**options)}


def localise(model: nn.Module, rules: Mapping[str, str]) -> None:
    """Replaces DTensors by this rank's parts, and replaced forwards by the modules' own with a sum where one is needed.

    Modules of other styles stay as Transformers made them.

    Args:
        model: as Transformers loaded it.
        rules: see `ShardPlan.rules`.
    """
    for name, module in list(model.named_modules()):
        style = rules.get(wildcards(name))
        own = (parameter for _, parameter in module.named_parameters(recurse=False))
        if style in _INPUT_SPLIT and isinstance(module, nn.Linear):
            _replace(model, name, _summed_linear(module))
        elif style in _SUMMED:
            vars(module).pop("forward", None)
            _localise(module)
            _replace(model, name, SummedModule(module))
        elif style in _ALONE:
            vars(module).pop("forward", None)
            _localise(module)
        elif style is None and any(isinstance(parameter, DTensor) for parameter in own):
            _localise(module)  # a parameter with a rule of its own, such as attention sinks


def _localise(module: nn.Module) -> None:
    """Makes a module's own parameters plain tensors: this rank's parts."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(parameter, DTensor):
            local = parameter.to_local().detach().contiguous()
            module._parameters[name] = nn.Parameter(local, requires_grad=False)
    if type(module) is nn.Linear:
        module.out_features, module.in_features = module.weight.shape


def _summed_linear(module: nn.Linear) -> SummedLinear:
    vars(module).pop("forward", None)
    bias = module._parameters["bias"]
    module._parameters["bias"] = None
    _localise(module)
    whole = bias.full_tensor() if isinstance(bias, DTensor) else bias
    return SummedLinear(module, None if whole is None else whole.detach())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
