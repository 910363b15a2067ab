"""The trace on zeros, of models whose forward branches on the values of tensors, says what the trace on shapes does."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig

from specplug.errors import UnsupportedModelError
from specplug.model.architecture import inspection, trace
from specplug.model.architecture.inspection import inspect_architecture
from specplug.model.architecture.trace import Trace
from support.models import BRANCHING, REPRESENTATIVE, make_config


def on_zeros(model: torch.nn.Module, model_type: str, dtype: torch.dtype) -> Trace:
    trace._give_values(model)
    return trace.run_trace(model, model_type, dtype, "cpu")


@pytest.mark.parametrize("architecture", [*REPRESENTATIVE, "gpt2", "opt", "qwen3_moe"])
def test_it_says_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(architecture, experts_implementation=None)
    on_shapes = inspection._inspect(config, torch.float32, trust_remote_code=False)
    monkeypatch.setattr(inspection, "run_trace", on_zeros)
    found = inspection._inspect(make_config(architecture), torch.float32, trust_remote_code=False)  # experts one by one
    assert not on_shapes.reads_values
    assert found == attrs.evolve(on_shapes, reads_values=True, linears=(), shards=found.shards)


@pytest.mark.parametrize(("architecture", "calls", "layers"), [("jetmoe", 3, 3), ("longcat_flash", 6, 3)])
def test_a_model_that_branches(architecture: str, calls: int, layers: int) -> None:
    assert architecture in BRANCHING
    found = inspect_architecture(make_config(architecture), torch.float32)
    assert (found.reads_values, len(found.calls), len(found.layers), found.linears) == (True, calls, layers, ())
    assert len({call.module for call in found.calls}) == calls


class Sizes(TorchDispatchMode):
    """The most numbers of any tensor on the CPU that an operation made, unless it is a view of another."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("architecture", BRANCHING)
def test_large_models_take_no_memory(architecture: str) -> None:
    with Sizes() as sizes:
        found = inspection._inspect(AutoConfig.for_model(architecture), torch.bfloat16, trust_remote_code=False)
    assert found.weight_bytes > 1 << 32
    assert sizes.largest < 32 << 20  # a router in float32


@pytest.mark.parametrize("architecture", BRANCHING)
def test_it_is_not_split_over_ranks(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"tensor_parallel_size=2: .* branches on the values of tensors"):
        inspect_architecture(make_config(architecture), torch.float32).of_rank(2)


def test_tied_weights_stay_tied() -> None:
    layer = torch.nn.Linear(4, 4, bias=False, device="meta")
    model = torch.nn.ModuleDict({"a": layer, "b": torch.nn.Linear(4, 4, bias=False, device="meta")})
    model["b"].weight = layer.weight
    trace._give_values(model)
    assert model["a"].weight is model["b"].weight
    assert model["a"].weight.untyped_storage().nbytes() == 4


def test_a_model_that_cannot_be_traced_on_zeros_either_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_give_values", lambda model: None)  # as if it kept tensors elsewhere
    with pytest.raises(UnsupportedModelError, match="model type 'jetmoe' c"):
        inspection._inspect(make_config("jetmoe"), torch.float32, trust_remote_code=False)
