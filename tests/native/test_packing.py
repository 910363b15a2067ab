"""Packed linear layers compute what plain ones do, for every architecture, and cost the memory that is planned."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from specplug import LLM, native
from specplug.model.load import packing, weights
from specplug.model.load.packing import PackedLinear, can_pack, is_packable, pack_linears
from support.models import ARCHITECTURES, VOCABULARY, save_model
from support.recurrent import save_recurrent

CPU = torch.device("cpu")
PACKS = can_pack(
    torch.bfloat16, CPU
)  # a CPU without bfloat16 kernels runs plain layers, which the tests then hold for both


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 6, 33])
@pytest.mark.parametrize(("inner", "outer"), [(32, 64), (192, 4096), (7, 13), (48, 30)])
def test_equals_a_plain_linear_layer(inner: int, outer: int, rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    plain = nn.Linear(inner, outer, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    states = torch.randn(1, rows, inner, dtype=torch.bfloat16)
    packed = PackedLinear(plain) if is_packable(plain) else plain
    exact = torch.nn.functional.linear(
        states.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double()
    )
    torch.testing.assert_close(packed(states).double(), exact, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(packed(states[:, ::2]), packed(states)[:, ::2], atol=1e-2, rtol=1e-2)
    assert packed.weight.shape == plain.weight.shape


@pytest.mark.engine
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_models_give_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    monkeypatch.setattr(packing, "_MOST_PADDING", 99.0)  # these layers are tiny
    folder = save_model(tmp_path, architecture)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    packed = weights.load_model(folder, config, torch.bfloat16, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "pack_linears", lambda model, skip: 0)
        plain = weights.load_model(folder, config, torch.bfloat16, CPU)
    if PACKS and architecture != "gpt2":  # its projections are of a class of their own
        assert any(isinstance(module, PackedLinear) for module in packed.modules())
    ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    logits = []
    for model in (packed, plain):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            logits.append(model(ids, use_cache=False).logits.float())
    difference = (logits[0] - logits[1]).pow(2).mean().sqrt() / logits[1].pow(2).mean().sqrt()
    assert difference < 0.03


def test_other_dtypes_and_subclasses_stay_as_they_are() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4, dtype=torch.bfloat16))
    assert pack_linears(model) == 0
    assert [type(module) for module in model] == [nn.Linear, Special]


class ScaledTensor(torch.Tensor):
    """Like the weights of quantisation libraries: what its numbers mean is known to its class alone."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.nn.functional.linear:
            states, weight, *rest = args
            return func(states, weight.as_subclass(torch.Tensor) * 4, *rest, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", ["weight of its own class", "replaced forward", "hook", "no weight"])
def test_layers_that_do_more_than_multiply_by_their_numbers_stay_as_they_are(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)).requires_grad_(False)
    layer = model[0]
    weight = layer.weight.detach().clone()
    states = torch.randn(2, 64, dtype=torch.bfloat16)
    if kind == "weight of its own class":
        layer.weight = nn.Parameter(weight.as_subclass(ScaledTensor), requires_grad=False)
    elif kind == "hook":
        layer.register_forward_hook(lambda module, inputs, output: output * 4)
    else:
        if kind == "no weight":
            del layer.weight
        layer.forward = lambda inputs: torch.nn.functional.linear(inputs, weight) * 4
    assert pack_linears(model) == 0
    torch.testing.assert_close(model(states), torch.nn.functional.linear(states, weight * 4), atol=1e-1, rtol=1e-2)


@pytest.mark.engine
def test_the_plan_counts_what_is_held(tmp_path: Path) -> None:
    """One copy of the weights; only a table tied to the embedding is there twice."""
    for tied in (False, True):
        sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512, "head_dim": 32}
        folder = save_model(tmp_path / str(tied), "llama", tie_word_embeddings=tied, **sizes)
        gc.collect()
        with LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", device="cpu", memory="64MiB") as llm:
            model = llm.engine.runner.model
            held = sum(parameter.nbytes for parameter in model.parameters())
            held += sum(buffer.nbytes for buffer in model.buffers())
            packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
            assert bool(packed) == PACKS
            held += sum(module.num_bytes for module in packed if not module.is_native)  # native ones are buffers
            assert llm.engine.plan.target_weights == pytest.approx(held, rel=0.01)


def test_packed_weights_lie_in_one_piece_that_goes_with_the_last_of_them() -> None:
    if not native.load() or not native.packs_bfloat16():
        return
    model = nn.Sequential(*(nn.Linear(256, 4096, bias=False, dtype=torch.bfloat16) for _ in range(4)))
    weights = [layer.weight.detach().clone() for layer in model]
    assert pack_linears(model) == 4
    pieces = {layer.packed.untyped_storage().data_ptr() for layer in model}
    assert len(pieces) == 1
    assert model[0].packed.untyped_storage().nbytes() == sum(layer.num_bytes for layer in model)
    states = torch.randn(3, 256, dtype=torch.bfloat16)
    last = model[3]
    del model
    gc.collect()
    torch.testing.assert_close(last(states), states @ weights[3].t(), atol=2e-2, rtol=2e-2)


@pytest.mark.engine
def test_layers_whose_weights_the_model_reads_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba multiplies by `dt_proj.weight` without calling the layer, and a packed layer has no such values."""
    monkeypatch.setattr(packing, "_MOST_PADDING", 99.0)
    folder = save_recurrent(tmp_path, "mamba")
    for options in ({"dtype": "bfloat16"}, {"dtype": "float32", "quantization": "int8"}):
        with LLM(folder, skip_tokenizer_init=True, device="cpu", memory="64MiB", **options) as llm:
            kinds = {name.rpartition(".")[2]: type(part) for name, part in llm.engine.runner.model.named_modules()}
            assert kinds["dt_proj"] is nn.Linear
            assert (kinds["in_proj"] is not nn.Linear) == (PACKS or "quantization" in options)
            assert len(llm.generate([[5, 6, 7]])[0].outputs[0].token_ids)
