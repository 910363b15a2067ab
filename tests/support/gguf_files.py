"""Small GGUF files, written by the package gguf from a folder with the same model; without it, the test is skipped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.models import save_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
_OWN_SIZES = {"qwen3": {"head_dim": 128}}  # Transformers does not read it from the file


def save_gguf(file: Path, architecture: str, quantisation: str, seed: int = 0, **sizes: Any) -> Path:
    """Writes a random model, tiny by default, with its matrices in a GGML type such as `Q8_0`; returns the file."""
    plain = save_model(
        file.with_suffix(""), architecture, seed=seed, **{**SIZES, **_OWN_SIZES.get(architecture, {}), **sizes}
    )
    return convert(plain, file, quantisation)


def convert(
    folder: Path,
    file: Path,
    quantisation: str,
    metadata: Mapping[str, str | int] | None = None,
    tensors: Sequence[str] = (),
) -> Path:
    """Writes a folder's model, and its tokenizer if it has one, as a GGUF file, with more values and tensors; returns it."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(str(file), config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder, config.vocab_size)
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(key, value)
    for name in tensors:
        writer.add_tensor(name, np.ones(8, dtype=np.float32))
    architecture = next(arch for arch, own in gguf.MODEL_ARCH_NAMES.items() if own == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = _interleaved(values, heads)
        kind = gguf.GGMLQuantizationType[quantisation if values.ndim > 1 else "F32"]
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")), gguf.quants.quantize(values, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    tokens, merges = ["a", "b", "ab", *(f"t{token}" for token in range(3, vocab_size))], ["a b"]
    if (folder / "tokenizer.json").is_file():  # a byte-level BPE
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        tokens, merges = sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))  # 3: control
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Llama's queries and keys in the order in which llama.cpp rotates them: neighbours, not halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
