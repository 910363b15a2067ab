"""`quantization="int8"`: the kernel, its fallback in PyTorch, the plan, and what an engine generates with it."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from specplug import LLM, SamplingParams, native
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from specplug.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from specplug.model.load import int8
from specplug.model.load.int8 import Int8Linear, int8_shape, quantise, quantise_linears
from specplug.native.operators import JOINED
from support.models import VOCABULARY, save_model
from support.recurrent import RECURRENT, save_recurrent
from support.reference import decisive_prompts

COMMON: dict[str, Any] = {"skip_tokenizer_init": True, "device": "cpu", "memory": "64MiB", "quantization": "int8"}
NEW_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def int8_layer(plain: nn.Linear) -> tuple[Int8Linear, torch.Tensor]:
    """A layer's int8 form, and the weight that its integers and scales stand for, in float64."""
    native_one = int8.is_native(plain.in_features, plain.weight.dtype)
    shape = int8_shape(plain.out_features, plain.in_features, is_native=native_one)
    integers, scales = quantise(plain.weight)
    return Int8Linear(plain, torch.zeros(shape, dtype=torch.int8)), integers.double() * scales.double()[:, None]


def test_every_weight_becomes_the_nearest_integer_of_its_output() -> None:
    weight = torch.tensor([[0.5, -1.27, 0.014], [0.0, 0.0, 0.0], [300.0, -150.0, 1.0]], dtype=torch.bfloat16)
    integers, scales = quantise(weight)
    assert integers.abs().amax(1).tolist() == [127, 0, 127]
    assert bool(((integers * scales[:, None] - weight.float()).abs() <= scales[:, None] * 0.50001).all())
    for bad in (math.nan, math.inf):
        with pytest.raises(CheckpointError, match="not finite"):
            quantise(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("kernel", ["native", "PyTorch"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 6, 14, 33, 130])
@pytest.mark.parametrize(("inner", "outer"), [(32, 64), (192, 500), (4200, 40), (7, 13), (30, 1), (352, 96)])
def test_a_layer_multiplies_by_its_integers_and_scales(
    monkeypatch: pytest.MonkeyPatch, inner: int, outer: int, rows: int, bias: bool, kernel: str
) -> None:
    """Both differ from the exact result by float32 sums and one rounding to bfloat16, hence at most by twice that."""
    native.load()
    if kernel == "PyTorch":
        monkeypatch.setattr(native, "packs_bfloat16", lambda: False)
    torch.manual_seed(rows)
    plain = nn.Linear(inner, outer, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    states = torch.randn(1, rows, inner, dtype=torch.bfloat16)
    layer, weight = int8_layer(plain)
    assert layer.is_native == (native.packs_bfloat16() and inner % 2 == 0)
    exact = nn.functional.linear(states.double(), weight, None if plain.bias is None else plain.bias.double())
    sums = nn.functional.linear(states.double().abs(), weight.abs())
    result = layer(states)
    assert result.dtype == torch.bfloat16
    assert layer.weight.shape == plain.weight.shape
    assert bool(((result.double() - exact).abs() <= exact.abs() * 2**-8 + sums * 2**-18).all())


@pytest.mark.parametrize("inner", [64, 352, 2560])
def test_a_row_does_not_depend_on_the_rows_beside_it(inner: int) -> None:
    if not native.load() or not native.packs_bfloat16():
        return
    torch.manual_seed(0)
    layer, _ = int8_layer(nn.Linear(inner, 100, bias=False, dtype=torch.bfloat16).requires_grad_(False))
    states = torch.randn(300, inner, dtype=torch.bfloat16)
    whole = layer(states)
    for count in (1, 2, 5, 15, 16, 17, 33, 100, 200):
        assert torch.equal(layer(states[:count]), whole[:count])
        assert torch.equal(layer(states[-count:]), whole[-count:])


@pytest.mark.parametrize("rows", [1, 5, 17, 40])
def test_joined_and_gated_linears(rows: int) -> None:
    """Linears of one call, in int8 and in bfloat16, give what each gives alone."""
    if not native.load() or not native.packs_bfloat16():
        return
    torch.manual_seed(rows)
    plain = [nn.Linear(96, outer, dtype=torch.bfloat16).requires_grad_(False) for outer in (64, 32, 64)]
    layers = [int8_layer(linear)[0] for linear in plain]
    dense = torch.empty(2, 96 * 32, dtype=torch.bfloat16)
    torch.ops.specplug.pack_weight(plain[2].weight, dense)
    states = torch.randn(rows, 96, dtype=torch.bfloat16)
    for third in (layers[2].packed, dense):
        weights, biases = [layers[0].packed, layers[1].packed, third], [linear.bias for linear in plain]
        together = JOINED[3](states, *weights, *biases, 64, 32, 64)
        for index, outer in enumerate((64, 32, 64)):
            alone = torch.ops.specplug.linear(states, weights[index], biases[index], outer)
            assert torch.equal(together[index], alone)
        gated = torch.ops.specplug.gated_linears(states, weights[0], third, biases[0], biases[2], 64, 0)
        expected = nn.functional.silu(together[0].float()) * together[2].float()
        torch.testing.assert_close(gated.float(), expected, atol=3e-2, rtol=2e-2)


def test_packed_int8_weights_are_checked() -> None:
    if not native.load() or not native.packs_bfloat16():
        return
    states = torch.zeros(1, 64, dtype=torch.bfloat16)
    for shape in ((1, 64 * 32), (2, 64 * 32 + 128), (1, 64 * 32 + 127)):
        with pytest.raises(RuntimeError, match="or a packed int8 weight of 1 x 2176"):
            torch.ops.specplug.linear(states, torch.zeros(shape, dtype=torch.int8), None, 32)
    with pytest.raises(RuntimeError, match="expected bfloat16 memory"):
        torch.ops.specplug.pack_weight(
            torch.zeros(32, 64, dtype=torch.bfloat16), torch.zeros(1, 2176, dtype=torch.int8)
        )


def test_only_plain_layers_are_quantised() -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": Special(8, 8), "c": nn.Embedding(8, 8)}).requires_grad_(False)
    assert quantise_linears(model) == 1
    assert [type(part) for part in model.values()] == [Int8Linear, Special, nn.Embedding]


# ---- engines ------------------------------------------------------------------------------------------------------


def dequantised(folder: Path, root: Path) -> Path:
    """The same model with the weights that int8 stands for, as a checkpoint of its own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            if type(module) is nn.Linear:
                integers, scales = quantise(module.weight)
                module.weight = nn.Parameter(integers * scales[:, None])
    model.config.tie_word_embeddings = False  # the embedding keeps its precision
    model.save_pretrained(root)
    return root


@pytest.mark.engine
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "granitemoehybrid", "mamba"])
def test_equals_generate_of_the_dequantised_checkpoint(tmp_path: Path, architecture: str) -> None:
    folder = save_recurrent(tmp_path, architecture) if architecture in RECURRENT else save_model(tmp_path, architecture)
    pairs = decisive_prompts(dequantised(folder, tmp_path / "dense"), 3, NEW_TOKENS, VOCABULARY)
    draft = save_model(tmp_path / "draft", "llama", seed=1, num_hidden_layers=1)
    methods: list[dict[str, Any] | None] = [
        None,
        NGRAM,
        {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3},
    ]
    for method in methods:
        with LLM(folder, dtype="float32", strict=True, speculative_config=method, **COMMON) as llm:
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in pairs], GREEDY)
            assert any(isinstance(module, Int8Linear) for module in llm.engine.runner.model.modules())
        assert [list(output.outputs[0].token_ids) for output in outputs] == [tokens for _, tokens in pairs], method


@pytest.mark.engine
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_speculation_changes_nothing_in_bfloat16(compiled: bool) -> None:
    """On the native kernels, whose rows have the same bits in any batch; PyTorch's in bfloat16 do not, and a tie may tip."""
    if not native.load() or not native.packs_bfloat16():
        pytest.skip("no kernels for bfloat16 weights on this machine")
    prompts = ["import os\n", "def main():\n    return", "class Point:\n    def __init__(self, x"]
    found = []
    for method in (None, NGRAM, {"method": "eagle3", "model": "tiny", "num_speculative_tokens": 4}):
        with LLM(
            "tiny",
            dtype="bfloat16",
            device="cpu",
            memory="128MiB",
            quantization="int8",
            strict=True,
            compile=compiled,
            speculative_config=method,
        ) as llm:
            found.append(
                [
                    output.outputs[0].token_ids
                    for output in llm.generate(prompts, SamplingParams(max_tokens=48, temperature=0))
                ]
            )
    assert found[0] == found[1] == found[2]


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_plan_counts_what_is_held(tmp_path: Path, dtype: str, tied: bool) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512, "head_dim": 32}
    folder = save_model(tmp_path, "llama", tie_word_embeddings=tied, **sizes)
    gc.collect()
    with LLM(folder, dtype=dtype, **COMMON) as llm:
        model = llm.engine.runner.model
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        assert llm.engine.plan.target_weights == pytest.approx(held, rel=0.001)
        assert type(model.get_output_embeddings()) is Int8Linear


def test_what_it_is_not_for(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")

    def plan(model: Path = folder, **options: Any) -> None:
        plan_engine(EngineConfig.create(model, memory="64MiB", quantization="int8", **options))

    plan(device="cpu")
    with pytest.raises(ConfigurationError, match="quantization='int8' runs in one process"):
        plan(device="cpu", tensor_parallel_size=2)
    with pytest.raises(UnsupportedModelError, match="has no plain linear layers"):
        int8.int8_bytes((), torch.float32, "Model")
    with pytest.raises(ConfigurationError, match="quantization='int4': expected 'int8' or None"):
        EngineConfig.create(folder, quantization="int4")
