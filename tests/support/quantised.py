"""Tiny quantised checkpoints, written by the library of each format; without it, the test is skipped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.adapters import add_adapter
from support.models import VOCABULARY, save_model

GROUP = 32
DTYPES = {"fp8": "bfloat16", "mxfp4": "bfloat16"}  # what Transformers makes of it
_MARGINS = {  # int8 and FP8 activations, bfloat16: these round more than float32
    "bitsandbytes-8bit": 0.5,
    "fp8": 0.5,
    "mxfp4": 0.5,
    "compressed-tensors-w8a8": 0.05,
    "compressed-tensors-fp8": 0.05,
}
_BASES = {"mxfp4": ("gpt_oss", {"intermediate_size": 64})}
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}


def save_quantised(folder: Path, kind: str, dtype: str, **sizes: Any) -> Path:
    """Writes a random model of a kind in `KINDS`, its other weights in a dtype, tiny by default; returns its folder."""
    KINDS[kind](save_plain(folder / "plain", kind, dtype, **sizes), folder / kind)
    return folder / kind


def save_plain(folder: Path, kind: str, dtype: str, **sizes: Any) -> Path:
    """Writes what a kind quantises; returns its folder."""
    base, own = _BASES.get(kind, ("llama", {}))
    plain = save_model(folder, base, **{**_SIZES, **own, **sizes})
    AutoModelForCausalLM.from_pretrained(plain, dtype=dtype).save_pretrained(plain)
    return plain


def _by_transformers(plain: Path, folder: Path, config: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain, dtype="auto", quantization_config=config)
    model.save_pretrained(folder)


def _torchao(plain: Path, folder: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    _by_transformers(plain, folder, TorchAoConfig(Int8WeightOnlyConfig(version=2)))


def _torchao_int4(plain: Path, folder: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    _by_transformers(plain, folder, TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP))))


def _bitsandbytes(plain: Path, folder: Path, **how: Any) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig

    _by_transformers(plain, folder, BitsAndBytesConfig(**how))


def _compressed(plain: Path, folder: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import pack_to_int32

    def quantise(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.unflatten(1, (-1, GROUP)).float()
        scale = groups.abs().amax(2) / 7
        values = (groups / scale[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int8)
        return {
            f"{name}_packed": pack_to_int32(values, 4),
            f"{name}_scale": scale.to(weight.dtype),
            f"{name}_shape": torch.tensor(weight.shape),
        }

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    _by_hand(
        plain,
        folder,
        quantise,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    )


def _compressed_with_activations(plain: Path, folder: Path, kind: str) -> None:
    pytest.importorskip("compressed_tensors")
    largest, dtype = (127, torch.int8) if kind == "int" else (448, torch.float8_e4m3fn)

    def quantise(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.float().abs().amax(1, keepdim=True) / largest
        values = weight.float() / scale
        return {name: (values.round() if kind == "int" else values).to(dtype), f"{name}_scale": scale.to(weight.dtype)}

    how = {"num_bits": 8, "type": kind, "symmetric": True}
    groups = {
        "targets": ["Linear"],
        "weights": {**how, "strategy": "channel"},
        "input_activations": {**how, "strategy": "token", "dynamic": True},
    }
    _by_hand(
        plain,
        folder,
        quantise,
        {
            "quant_method": "compressed-tensors",
            "format": f"{kind}-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": groups},
        },
    )


def _gptq(plain: Path, folder: Path) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")

    def quantise(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, zeros, scales = _four_bits(weight)  # the format stores zero points less 1
        layer = name.removesuffix("weight")
        return {
            f"{layer}qweight": _packed(codes.T).T.contiguous(),
            f"{layer}qzeros": _packed((zeros - 1) & 15),
            f"{layer}scales": scales,
            f"{layer}g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
        }

    how = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    _by_hand(plain, folder, quantise, how)


def _awq(plain: Path, folder: Path) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("accelerate")
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def quantise(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, zeros, scales = _four_bits(weight)
        layer = name.removesuffix("weight")
        qweight, qzeros = (_packed(t.unflatten(1, (-1, 8))[..., order].flatten(1)) for t in (codes, zeros))
        return {f"{layer}qweight": qweight, f"{layer}qzeros": qzeros, f"{layer}scales": scales}

    how = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    _by_hand(plain, folder, quantise, {**how, "modules_to_not_convert": ["lm_head"]})


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [in, out], zero points and float16 scales [in / GROUP, out] of a weight [out, in]."""
    groups = weight.float().T.unflatten(0, (-1, GROUP))
    scales = (groups.abs().amax(1) / 7).half()
    codes = (groups / scales[:, None].float()).round().clamp(-8, 7) + 8
    return codes.flatten(0, 1).int(), torch.full(scales.shape, 8, dtype=torch.int32), scales


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes of a row in each int32, the first one lowest."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int64)
    words = (codes.long().unflatten(1, (-1, 8)) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _mxfp4(plain: Path, folder: Path) -> None:
    pytest.importorskip("accelerate")
    levels = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def quantise(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.float().transpose(1, 2).unflatten(2, (-1, GROUP))  # [experts, outputs, groups, GROUP]
        exponents = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
        values = groups / exponents.exp2()
        codes = (values.abs()[..., None] - levels).abs().argmin(-1) + 8 * (values < 0)
        return {
            f"{name}_blocks": (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8),
            f"{name}_scales": (exponents[..., 0] + 127).to(torch.uint8),
        }

    _by_hand(plain, folder, quantise, {"quant_method": "mxfp4"}, r"experts\.\w+_proj$")


def _fp8(plain: Path, folder: Path) -> None:
    pytest.importorskip("accelerate")

    def quantise(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.float().abs().amax() / 448
        blocks = [-(-size // 128) for size in weight.shape]
        return {
            name: (weight.float() / scale).to(torch.float8_e4m3fn),
            f"{name}_scale_inv": scale.expand(blocks).contiguous(),
        }

    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    _by_hand(plain, folder, quantise, how)


def _by_hand(
    plain: Path,
    folder: Path,
    quantise: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    how: dict[str, Any],
    chosen: str = r"_proj\.weight$",
) -> None:
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        tensors |= quantise(name, weight) if re.search(chosen, name) else {name: weight}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "torchao-int8": _torchao,
    "torchao-int4": _torchao_int4,
    "bitsandbytes-8bit": lambda plain, folder: _bitsandbytes(plain, folder, load_in_8bit=True),
    "bitsandbytes-4bit": lambda plain, folder: _bitsandbytes(
        plain, folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"
    ),
    "compressed-tensors-int4": _compressed,
    "compressed-tensors-w8a8": lambda plain, folder: _compressed_with_activations(plain, folder, "int"),
    "compressed-tensors-fp8": lambda plain, folder: _compressed_with_activations(plain, folder, "float"),
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
}


def decided_pairs(
    folder: Path, kind: str, count: int, new_tokens: int, adapter: Path | None = None
) -> list[tuple[list[int], list[int]]]:
    """(prompt, output) pairs of Transformers' own `generate`, with an adapter or without one, as far as it is decided.

    The checkpoint is a folder or a GGUF file.
    """
    options: dict[str, Any] = {"device_map": "cpu"} if "bitsandbytes" in kind else {}
    if folder.suffix == ".gguf":
        folder, options = folder.parent, {"gguf_file": str(folder)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()
    if adapter is not None:
        add_adapter(model, adapter)
    generator = torch.Generator().manual_seed(0)
    pairs: list[tuple[list[int], list[int]]] = []
    for attempt in range(40):
        length = 3 + 7 * (attempt % 5)
        prompt = torch.randint(3, VOCABULARY, (1, length), generator=generator)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        margins = [float(top[0] - top[1]) for top in (step[0].topk(2).values for step in out.logits)]
        sure = next(
            (number for number, margin in enumerate(margins) if not margin > _MARGINS.get(kind, 2e-4)), new_tokens
        )
        if sure >= new_tokens // 2:
            pairs.append((prompt[0].tolist(), out.sequences[0, length : length + sure].tolist()))
        if len(pairs) == count:
            return pairs
    raise AssertionError(f"only {len(pairs)} decided prompts")


def save_with_settings(folder: Path, settings: dict[str, Any]) -> Path:
    """Gives a model's config.json a `quantization_config`; returns its folder."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "quantization_config": settings}), encoding="utf-8")
    return folder
