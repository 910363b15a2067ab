"""Checkpoints that are no EAGLE head, another variant, damaged, or for another target: one clear error each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import CASES, GOLDEN, Tensors, handle_of, open_head, rewrite

from specplug.errors import CheckpointError, ConfigurationError
from specplug_eagle.checkpoint import EagleCheckpoint, validate

pytestmark = pytest.mark.unit

CASE = "speculators_default"
LAYER = "transformer_layer_config"


def put(*names: str, size: tuple[int, ...] = (1,)) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(size) for name in names})


def drop(*names: str) -> Callable[[Tensors], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


def resize(name: str, *size: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(size, dtype=tensors[name].dtype)})


def say(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.update(fields)


def say_layer(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config[LAYER].update(fields)


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        EagleCheckpoint.open(handle_of(folder))
    text = str(raised.value)
    assert str(folder) in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("mask_hidden"), "parallel-drafting"),
        (put("layers.0.self_attn.q_a_proj.weight"), "latent attention"),
        (put("midlayer.self_attn.kv_a_proj_with_mqa.weight"), "latent attention"),
        (put("blocks.0.weight"), "Medusa"),
        (put("input_norm1.weight"), "MiniCPM"),
        (put("embed_layernorm.weight"), "HASS"),
        (put("layers.0.mlp.experts.0.up_proj.weight"), "mixture of experts"),
        (put("layers.0.mlp.gate.weight"), "mixture of experts"),
        (put("layers.0.self_attn.qkv_proj.weight"), "fused projections"),
        (put("layers.0.mlp.up_proj.weight_scale"), "quantised"),
        (put("eh_proj.weight"), "MTP"),
        (put("token_map"), "does not use 'token_map'"),
        (put("layers.0.self_attn.sinks", "b", "c", "d", "e"), "does not use 'b', 'c', 'd', 'e' and 1 more"),
        (put("fc_norm.0.weight", size=(16,)), "no 'fc_norm.0.weight'|says fc_norm: false, but the checkpoint has"),
        (put("midlayer.mlp.up_proj.weight"), "twice, as 'layers.0.mlp.up_proj.weight' and as 'midlayer"),
        (drop("fc.weight"), "lacks 'fc.weight'"),
        (drop("norm.weight"), "lacks 'norm.weight'"),
        (drop("layers.0.mlp.up_proj.weight"), "lacks 'layers.0.mlp.up_proj.weight'"),
        (drop("layers.0.self_attn.o_proj.weight"), "lacks 'layers.0.self_attn.o_proj.weight'"),
        (drop("layers.0.hidden_norm.weight"), "lacks 'layers.0.hidden_norm.weight'"),
        (
            resize("layers.0.self_attn.q_proj.weight", 16, 31),
            "q_proj.weight' takes 31 inputs, but an EAGLE-3 .* 16 takes 32",
        ),
        (
            drop("lm_head.weight"),
            "without lm_head the head's output is the target's: 40|config.json says draft_vocab_size",
        ),
        (drop("d2t", "t2d"), "24 of the vocabulary's 40 tokens, but neither d2t nor t2d"),
        (put("layers.2.mlp.up_proj.weight"), "holds draft layer 2, but not layer 1"),
        (put("layers.0.self_attn.q_proj.bias", size=(16,)), "lacks 'layers.0.self_attn.k_proj.bias'"),
        (resize("fc.weight", 16, 47), "takes 47 inputs"),
        (resize("fc.weight", 15, 48), r"'fc.weight' has the shape \[15, 48\] where \[16, 48\]"),
        (resize("fc.weight", 16), r"'fc.weight' has the shape \[16\]; a matrix"),
        (
            resize("layers.0.self_attn.o_proj.weight", 0, 16),
            r"'layers.0.self_attn.o_proj.weight' .*\[0, 16\]: it is empty",
        ),
        (resize("norm.weight", 17), r"'norm.weight' has the shape \[17\] where \[16\]"),
        (resize("layers.0.self_attn.q_proj.weight", 18, 32), "has 18 rows, but config.json says 4 heads of 4: 16"),
        (
            resize("layers.0.self_attn.k_proj.weight", 12, 32),
            "has 12 rows, but config.json says 2 key-value heads of 4: 8",
        ),
        (
            resize("layers.0.mlp.gate_proj.weight", 23, 16),
            "intermediate_size 24, but 'layers.0.mlp.gate_proj.weight' has 23",
        ),
        (resize("lm_head.weight", 23, 16), "'lm_head.weight' has 23 rows, but d2t has 24 entries"),
        (resize("embed_tokens.weight", 41, 16), "'embed_tokens.weight' has 41 rows, but t2d has 40 entries"),
        (resize("d2t", 23), "'lm_head.weight' has 24 rows, but d2t has 23 entries"),
        (resize("d2t", 24, 1), r"'d2t' has the shape \[24, 1\]; a vector"),
        (lambda t: t.update(d2t=t["d2t"].float()), "'d2t' is float32; integers"),
        (lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.int8)}), "'fc.weight' is int8"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("layers")], "no attention layer 'layers.0'"),
    ],
)
def test_tensors_that_are_wrong(change: Callable[[Tensors], Any], message: str, tmp_path: Path) -> None:
    refuses(rewrite(CASE, tmp_path / "head", tensors=change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (say(speculators_model_type="peagle"), "parallel drafting"),
        (say(speculators_model_type="dflash"), "DFlash"),
        (say(speculators_config={"algorithm": "medusa"}), "Medusa"),
        (say(speculators_model_type="eagle"), "'eagle', but the tensors are those of EAGLE-3"),
        (say(mask_token_id=5), "drafts in parallel.*mask_token_id"),
        (say(pard_token_id=5), "drafts in parallel.*pard_token_id"),
        (say(ptd_token_id=5), "drafts in parallel.*ptd_token_id"),
        (say(parallel_drafting=True), "drafts in parallel"),
        (say(dflash_config={"target_layer_ids": [1]}), "DFlash"),
        (say(eagle_config={"parallel_draft_step": 4}), "drafts 4 tokens in parallel"),
        (say(eagle_config={"use_mtp_layernorm": True}), "use_mtp_layernorm: true; only"),
        (say(eagle_config={"use_last_layernorm": False}), "use_last_layernorm: false; only"),
        (say(eagle_config={"next_layer_regular": False}), "next_layer_regular: false"),
        (say(eagle_config={"eh_proj_before_attn": True}), "eh_proj_before_attn: true"),
        (say(eagle_config={"use_input_layernorm_in_first_layer": False}), "use_input_layernorm_in_first_layer: false"),
        (
            say(eagle_config={"use_aux_hidden_state": False}),
            "use_aux_hidden_state: false, but the checkpoint has 'fc",
        ),
        (say(eagle_config=[]), "'eagle_config' is \\[\\]; it should be an object"),
        (say(layernorms=True), "HASS"),
        (say(norm_before_fc=True), "norm_before_fc: true, but the checkpoint has no 'input_norm.weight'"),
        (say(fc_norm=True), "fc_norm: true, but the checkpoint has no 'fc_norm.0.weight'"),
        (say(norm_output="yes"), "'norm_output' is 'yes'; it should be true or false"),
        (
            say(draft_vocab_size=23),
            "d2t has 24 entries|'lm_head.weight' has 24 rows, but config.json says draft_vocab_size 23",
        ),
        (say(draft_vocab_size=0), "'draft_vocab_size' is 0; it should be a positive integer"),
        (say(eagle_aux_hidden_state_layer_ids=[1, 2]), "takes 48 inputs"),
        (
            say(eagle_aux_hidden_state_layer_ids=[1, 2], target_hidden_size=16),
            "3 target states of 16.*names 2 layer ids",
        ),
        (say(eagle_aux_hidden_state_layer_ids=[1, "2", 3]), "should be a list of layer numbers"),
        (say(eagle_aux_hidden_state_layer_ids=[-1, 2, 3]), "should be a list of layer numbers"),
        (say(target_hidden_size=17), "takes 48 inputs, which no number of target layer ids|hidden size 17"),
        (say_layer(hidden_size=32), "hidden_size 32, but 'layers.0.self_attn.o_proj.weight' has 16 rows"),
        (say_layer(num_attention_heads=8), "has 16 rows, but config.json says 8 heads of 4: 32 rows"),
        (say_layer(num_key_value_heads=4), "has 8 rows, but config.json says 4 key-value heads of 4: 16 rows"),
        (say_layer(num_attention_heads=None, head_dim=None), "neither 'num_attention_heads' nor 'head_dim'"),
        (say_layer(num_attention_heads="4"), "'num_attention_heads' is '4'; it should be a positive integer"),
        (say_layer(intermediate_size=32), "intermediate_size 32, but 'layers.0.mlp.gate_proj.weight' has 24"),
        (say_layer(vocab_size=41), "has 40 rows, but config.json says vocab_size 41|t2d has 40"),
        (say_layer(rms_norm_eps=0), "'rms_norm_eps' is 0; it should be a positive number"),
        (say_layer(hidden_act="nope"), "'nope'"),
        (say_layer(model_type="gemma2"), "Gemma"),
        (say_layer(model_type="llama4"), "Llama 4"),
        (say_layer(rope_parameters={"rope_type": "longrope"}), "'longrope' is not supported"),
        (say_layer(rope_parameters={"rope_type": "llama3", "factor": 8}), "'llama3' lacks 'low_freq_factor'"),
        (say_layer(rope_parameters={"full_attention": {"rope_theta": 1.0}}), "for all layers is supported"),
        (say_layer(partial_rotary_factor=0.3), "rotates 1 elements"),
        (say_layer(layer_types=["chunked_attention"]), "'chunked_attention' are not supported"),
        (say_layer(use_sliding_window=True, max_window_layers="x"), "'max_window_layers' is 'x'"),
        (say_layer(rope_parameters={"rope_type": "yarn", "factor": 2, "beta_fast": "x"}), "'beta_fast' is 'x'"),
        (say_layer(layer_types=[]), "should name 1 draft layers"),
        (say_layer(layer_types=["sliding_attention"], sliding_window=None), "'sliding_window' is missing"),
        (lambda config: config.update({LAYER: 3}), "'transformer_layer_config' is 3"),
    ],
)
def test_configurations_that_are_wrong(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    refuses(rewrite(CASE, tmp_path / "head", config=change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("norm.weight", size=(16,)), "variant of EAGLE-1.*has 'norm.weight', but no"),
        (put("layers.0.input_layernorm.weight", size=(16,)), "variant of EAGLE-1.*'layers.0.input_layernorm.weight'"),
        (put("lm_head_layernorm.weight"), "HASS"),
        (drop("fc.weight"), "not an EAGLE draft head.*draft_model"),
        (resize("fc.weight", 16, 48), r"'fc.weight' has the shape \[16, 48\] where \[16, 32\]"),
        (put("layers.0.self_attn.q_proj.bias", size=(16,)), "lacks 'layers.0.self_attn.k_proj.bias'"),
    ],
)
def test_eagle_1_is_plain_or_refused(change: Callable[[Tensors], Any], message: str, tmp_path: Path) -> None:
    refuses(rewrite("eagle1_authors", tmp_path / "head", tensors=change), message)


def test_eagle_1_of_a_wider_target_is_refused(tmp_path: Path) -> None:
    refuses(rewrite("eagle1_authors", tmp_path / "head", config=say(target_hidden_size=24)), "24, but .* its own: 16")


class Target:
    def __init__(self, hidden_size: int = 16, vocab_size: int = 40) -> None:
        self.hidden_size, self.vocab_size, self.num_layers = hidden_size, vocab_size, 8


@pytest.mark.parametrize("case", CASES)
def test_another_targets_head_is_refused_with_both_values(case: str) -> None:
    spec = EagleCheckpoint.open(handle_of(GOLDEN / case)).spec
    hidden = spec.target_hidden_size
    validate(spec, Target(hidden))
    with pytest.raises(ConfigurationError, match=f"hidden size {hidden}, but the target's is 99"):
        validate(spec, Target(99))
    with pytest.raises(ConfigurationError, match="vocabulary of 40 tokens, but the target's has 41"):
        validate(spec, Target(hidden, 41))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_what_does_not_fit_cannot_be_borrowed(name: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for absent in (f"{name}.weight", *(("d2t", "t2d") if name == "lm_head" else ())):
            del tensors[absent]

    fields = say(draft_vocab_size=None) if name == "lm_head" else None
    spec = EagleCheckpoint.open(
        handle_of(rewrite("eagle3_wide_target", tmp_path / "h", tensors=change, config=fields))
    ).spec
    with pytest.raises(ConfigurationError, match=f"no {name}, and cannot borrow.*is 16, the target's 24"):
        validate(spec, Target(24))


@pytest.mark.parametrize("form", ["safetensors", "bin", "safetensors-sharded", "bin-sharded"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_one_clear_error(form: str, part: float, tmp_path: Path) -> None:
    folder = rewrite(CASE, tmp_path / "head", form=form)
    file = max(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"truncated|damaged") as raised:
        open_head(folder)
    assert file.name in str(raised.value)
    assert "download it again" in str(raised.value)


@pytest.mark.parametrize(("text", "message"), [(None, "no config.json"), ("{", "damaged"), ("[]", "damaged")])
def test_a_configuration_that_is_no_json_is_one_clear_error(text: str | None, message: str, tmp_path: Path) -> None:
    folder = rewrite(CASE, tmp_path / "head")
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        open_head(folder)
