"""Adapters on disk: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specplug import CheckpointError, ConfigurationError, LoRARequest, RequestError
from specplug.lora.config import read_adapter_config
from specplug.lora.layers import AdapterLayers
from specplug.lora.request import parse_lora_modules
from specplug.lora.weights import inspect_adapter, read_adapter
from specplug.model.linears import LinearLayer
from specplug.model.rows import ForwardRow

TARGETS = [
    LinearLayer(f"model.layers.{number}.self_attn.{name}", 6, outs)
    for number in range(2)
    for name, outs in (("q_proj", 8), ("v_proj", 4))
]
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"], "use_dora": False}
Q, V = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def tensors(layers: dict[str, int], rank: int = 2, prefix: str = "base_model.model.") -> dict[str, torch.Tensor]:
    found = {}
    for seed, (layer, outs) in enumerate(layers.items()):
        generator = torch.Generator().manual_seed(seed)
        found[f"{prefix}{layer}.lora_A.weight"] = torch.randn(rank, 6, generator=generator)
        found[f"{prefix}{layer}.lora_B.weight"] = torch.randn(outs, rank, generator=generator)
    return found


def write(folder: Path, config: dict[str, Any] | str, weights: dict[str, torch.Tensor] | None = None) -> Path:
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights is not None:
        save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5), ({"alpha_pattern": {"self_attn.q_proj": 3}}, 1.5)],
)
@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.language_model.", ""])
def test_low_rank_layers_with_their_scale(tmp_path: Path, config: dict[str, Any], scale: float, prefix: str) -> None:
    write(tmp_path, {**PLAIN, **config}, tensors({Q: 8}, prefix=prefix))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    weights = read_adapter(inspect_adapter(str(tmp_path), TARGETS, "Model"), torch.float32)
    assert (list(weights.layers), weights.rank) == ([Q], 2)
    assert torch.equal(weights.layers[Q].down, stored[f"{prefix}{Q}.lora_A.weight"])
    torch.testing.assert_close(weights.layers[Q].up, scale * stored[f"{prefix}{Q}.lora_B.weight"].t())


def test_ranks_of_single_layers(tmp_path: Path) -> None:
    pair = {**tensors({Q: 8}), **tensors({V: 4}, rank=5)}
    write(tmp_path, {**PLAIN, "rank_pattern": {r"layers\.0\..*v_proj": 5}}, pair)
    weights = read_adapter(inspect_adapter(str(tmp_path), TARGETS, "Model"), torch.bfloat16)
    assert {name: tuple(each.up.shape) for name, each in weights.layers.items()} == {Q: (2, 8), V: (5, 4)}
    assert weights.rank == 5
    assert weights.layers[Q].down.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported: DoRA"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported: trained biases"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters=.* not linear layers"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.*embeddings"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not supported.*own weights"),
        ({"use_something_new": 3}, "use_something_new=3 is not supported: this kind of LoRA is not known"),
        ({"peft_type": "IA3"}, "peft_type='IA3': only adapters of the type LORA"),
        ({"r": 0}, "r=0.*integers of at least 1"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern="),
        ({"lora_alpha": "8"}, "lora_alpha='8'"),
        ({"alpha_pattern": {"(": 3}}, "not a regular expression"),
    ],
)
def test_more_than_low_rank_layers_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"adapter_config.json.*{message}"):
        read_adapter_config(write(tmp_path, {**PLAIN, **changes}))


@pytest.mark.parametrize(("text", "message"), [("{", "is damaged"), ("[]", "not a JSON object")])
def test_a_damaged_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_adapter_config(write(tmp_path, text))


def test_harmless_keys_and_unknown_ones_that_are_off(tmp_path: Path) -> None:
    extra = {
        "eva_config": {"rho": 2},
        "megatron_config": None,
        "loftq_config": {},
        "new_switch": False,
        "lora_dropout": 0.1,
    }
    config = read_adapter_config(write(tmp_path, {**PLAIN, **extra, "init_lora_weights": "gaussian"}))
    assert (config.rank, config.most_rank, config.scale_of("x")) == (2, 2, 4.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "has no adapter_model.safetensors, or an empty one"),
        (tensors({"lm_head": 64}), "adapts 'lm_head', which is not among the linear layers of Model .*q_proj, v_proj"),
        (
            tensors({"model.layers.7.self_attn.q_proj": 8}),
            r"adapts 'model.layers.7.self_attn.q_proj', which is not among",
        ),
        (tensors({Q: 9}), r"'model.layers.1.self_attn.q_proj' has matrices of \[2, 6\] and \[9, 2\].*\[8, 2\]"),
        (tensors({Q: 8}, rank=3), r"\[3, 6\] and \[8, 3\], and the target with rank 2 needs"),
        ({f"base_model.model.{Q}.lora_A.weight": torch.ones(2, 6)}, "has lora_A alone"),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2)},
            "embed_tokens.lora_embedding_A' is not part",
        ),
        ({f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(2)}, "lora_magnitude_vector' is not part"),
        (tensors({Q: 8, Q.removeprefix("model."): 8}), "adapts 'model.layers.1.self_attn.q_proj' twice"),
    ],
)
def test_tensors_that_are_not_applied_are_refused(
    tmp_path: Path, weights: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        inspect_adapter(str(write(tmp_path, PLAIN, weights)), TARGETS, "Model")


def test_pickles_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    write(tmp_path, PLAIN)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"'adapter_model\.bin' is a pickle"):
        inspect_adapter(str(tmp_path), TARGETS, "Model")
    weights = tensors({Q: 8})
    weights[f"base_model.model.{Q}.lora_A.weight"][0, 0] = 1e6
    files = inspect_adapter(str(write(tmp_path, PLAIN, weights)), TARGETS, "Model")
    assert read_adapter(files, torch.bfloat16).rank == 2
    with pytest.raises(CheckpointError, match=r"are not finite in torch\.float16"):
        read_adapter(files, torch.float16)


def test_forms_of_lora_modules() -> None:
    expected = (LoRARequest("a", 1, "x"), LoRARequest("b", 2, "y"))
    assert parse_lora_modules({"a": "x", "b": Path("y")}) == expected
    assert parse_lora_modules([{"name": "a", "path": "x"}, ("b", "y")]) == expected
    assert parse_lora_modules([("c", "z"), LoRARequest("a", 1, "x")])[0].lora_int_id == 2
    assert parse_lora_modules(None) == ()
    for given, message in [
        ("a=x", "expected a mapping of names to folders"),
        ([{"name": "a"}], "expected a mapping of names to folders"),
        ([("a", "x"), ("a", "y")], "two adapters have the lora_name 'a'"),
        ([LoRARequest("a", 3, "x"), LoRARequest("b", 3, "x")], "two adapters have the lora_int_id 3"),
        ({"": "x"}, "lora_name=''"),
        ({"a": 3}, "lora_path=3"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            parse_lora_modules(given)


@pytest.mark.parametrize("arguments", [("a", 0, "x"), ("a", True, "x"), ("", 1, "x"), ("a", 1, ""), (3, 1, "x")])
def test_a_request_is_checked(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(RequestError, match="expected"):
        LoRARequest(*arguments)


def test_segments_join_neighbours_with_one_adapter() -> None:
    def row(count: int, adapter: int) -> ForwardRow:
        return ForwardRow([1] * count, 0, None, adapter=adapter)  # type: ignore[arg-type]

    assert AdapterLayers.segments([row(3, -1), row(1, -1)]) is None
    rows = [row(2, 1), row(3, 1), row(1, -1), row(4, 0), row(0, 0), row(1, 1)]
    found = AdapterLayers.segments(rows)
    assert found is not None
    assert found.tolist() == [[0, 5, 1], [6, 10, 0], [10, 11, 1]]
