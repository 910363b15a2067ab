"""One head in every layout and kind of file is the same head: the same logits, whatever is borrowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_forms import unrolled_logits
from checkpoint_files import GOLDEN, Tensors, golden_of, handle_of, open_head, rewrite

from specplug_eagle.checkpoint import EagleCheckpoint, validate

pytestmark = pytest.mark.unit

REDUCED, FULL = "speculators_norm_before_residual", "speculators_full_vocabulary"
FORMS = ["safetensors", "safetensors-sharded", "bin", "bin-sharded"]


def check_logits(folder: Path, **overrides: Any) -> EagleCheckpoint:
    features, ids, expected = golden_of(folder)
    checkpoint, head, _ = open_head(folder, **overrides)
    with torch.no_grad():
        for step, logits in enumerate(unrolled_logits(head, features, ids, 4)):
            torch.testing.assert_close(logits, expected[step, : len(ids) - step], atol=1e-5, rtol=0)
    return checkpoint


def rename(before: str, after: str, prefix: str = "") -> Any:
    def change(tensors: Tensors) -> None:
        renamed = {prefix + name.replace(before, after): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return change


def flat(fields: dict[str, Any]) -> None:
    layer = fields.pop("transformer_layer_config")
    flags = {
        name: fields[name]
        for name in ("draft_vocab_size", "norm_before_residual", "eagle_aux_hidden_state_layer_ids", "fc_norm")
    }
    fields.clear()
    fields.update(layer, **flags, architectures=["LlamaForCausalLMEagle3"])


def nested(fields: dict[str, Any]) -> None:
    flat(fields)
    for name in ("eagle_aux_hidden_state_layer_ids", "norm_before_residual"):
        fields.setdefault("eagle_config", {})[name] = fields.pop(name)
    fields["eagle_config"] |= {"use_aux_hidden_state": True, "use_last_layernorm": True}


def legacy(fields: dict[str, Any]) -> None:
    flat(fields)
    settings = fields.pop("rope_parameters")
    fields["rope_theta"] = settings["rope_theta"]
    fields["rope_scaling"] = None


def wrapped(fields: dict[str, Any]) -> None:
    flat(fields)
    inner = dict(fields)
    fields.clear()
    fields.update(model_type="eagle", model=inner)


LAYOUTS: dict[str, tuple[Any, Any]] = {
    "speculators": (None, None),
    "authors": (rename("layers.0.", "midlayer."), flat),
    "sglang": (rename("layers.0.", "midlayer."), nested),
    "modelopt": (rename("", ""), nested),
    "nemo": (rename("", "", "model."), nested),
    "module": (rename("", "", "module.draft_model."), legacy),
    "wrapped": (rename("layers", "model.layers"), wrapped),
}


@pytest.mark.parametrize("absent", [(), ("embed_tokens.weight",)])
@pytest.mark.parametrize("case", [REDUCED, FULL])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, case: str, absent: tuple[str, ...], tmp_path: Path) -> None:
    names, fields = LAYOUTS[layout]

    def change(tensors: Tensors) -> None:
        for name in absent:
            del tensors[name]
        if names is not None:
            names(tensors)

    checkpoint = check_logits(rewrite(case, tmp_path / "head", tensors=change, config=fields))
    spec = checkpoint.spec
    assert spec.layer_ids == (2, 4, 5)
    assert spec.draft_vocab_size == (24 if case == REDUCED else 40)
    assert spec.has_own_embedding == (not absent)


@pytest.mark.parametrize("absent", [("lm_head.weight",), ("lm_head.weight", "embed_tokens.weight")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_the_targets_output_layer(layout: str, absent: tuple[str, ...], tmp_path: Path) -> None:
    names, fields = LAYOUTS[layout]

    def change(tensors: Tensors) -> None:
        for name in absent:
            del tensors[name]
        if names is not None:
            names(tensors)

    checkpoint = check_logits(rewrite(FULL, tmp_path / "head", tensors=change, config=fields))
    assert not checkpoint.spec.has_own_lm_head
    assert checkpoint.spec.draft_vocab_size == 40


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["eagle1_biases", "eagle3_authors", REDUCED])
def test_files(form: str, case: str, tmp_path: Path) -> None:
    folder = rewrite(case, tmp_path / "head", form=form)
    assert any(folder.glob("*.bin")) == form.startswith("bin")
    check_logits(folder)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_needed_is_not_loaded(form: str, tmp_path: Path) -> None:
    def extras(tensors: Tensors) -> None:
        tensors["verifier_lm_head.weight"] = torch.zeros(24, 16)
        tensors["model.verifier_norm.weight"] = torch.zeros(16)
        tensors["midlayer.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
        tensors["t2d"] = torch.ones(40, dtype=torch.bool)
        tensors["d2t"] = torch.zeros(40, dtype=torch.int64)

    folder = rewrite(FULL, tmp_path / "head", tensors=extras, form=form)
    handle = handle_of(folder)
    checkpoint = EagleCheckpoint.open(handle)
    assert set(checkpoint.names) == {*checkpoint.spec.tensor_shapes(), "d2t"}
    handle.keep(checkpoint.names.values())
    sizes = [torch.Size(shape).numel() for shape in checkpoint.spec.tensor_shapes().values()]
    assert handle.num_bytes() == 4 * sum(sizes) + 8 * 40
    check_logits(folder)


def test_weights_are_cast_to_the_targets_dtype(tmp_path: Path) -> None:
    def halve(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.half() if tensor.is_floating_point() else tensor

    handle = handle_of(rewrite(REDUCED, tmp_path / "head", tensors=halve, form="bin"), torch.bfloat16)
    checkpoint = EagleCheckpoint.open(handle)
    handle.materialize(lambda done: None)
    head, _ = checkpoint.build(handle.tensors)
    assert {parameter.dtype for parameter in head.parameters()} == {torch.bfloat16}
    assert head.draft_to_target is not None
    assert head.draft_to_target.dtype == torch.int64


@pytest.mark.parametrize(
    ("case", "facts"),
    [
        ("eagle1_authors", ("eagle1", "flat", 1, 16)),
        ("eagle1_wrapped", ("eagle1", "wrapped", 1, 16)),
        ("eagle3_authors", ("eagle3", "flat", 3, 16)),
        ("eagle3_wide_target", ("eagle3", "flat", 3, 24)),
        ("eagle3_modelopt", ("eagle3", "eagle_config", 3, 16)),
        ("eagle3_single_state", ("eagle3", "eagle_config", 1, 16)),
        ("speculators_four_states", ("eagle3", "speculators", 4, 16)),
    ],
)
def test_what_is_found_out(case: str, facts: tuple[Any, ...]) -> None:
    spec = open_head(GOLDEN / case)[0].spec
    assert (spec.family, spec.layout, spec.num_aux_states, spec.target_hidden_size) == facts
    assert spec.uses_final_state == (facts[0] == "eagle1" or "single" in case)
    validate(spec, _Target(facts[3]))


class _Target:
    vocab_size, num_layers = 40, 8

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size


def test_the_format_decides_what_a_missing_flag_means(tmp_path: Path) -> None:
    folder = rewrite(REDUCED, tmp_path / "head", config=lambda fields: fields.pop("norm_before_residual"))
    checkpoint = check_logits(folder)
    assert checkpoint.spec.norm_before_residual
    assert any("norm_before_residual" in warning for warning in checkpoint.warnings)
    flat_default = open_head(GOLDEN / "eagle3_authors")[0]
    assert not flat_default.spec.norm_before_residual
    assert not flat_default.warnings


def test_an_ambiguous_norm_output_is_pointed_out(tmp_path: Path) -> None:
    checkpoint = open_head(GOLDEN / "eagle3_sglang")[0]
    assert checkpoint.spec.norm_output
    assert any("norm_output" in warning for warning in checkpoint.warnings)
    assert not open_head(GOLDEN / "eagle3_sglang", norm_output=False)[0].spec.norm_output
    assert not open_head(GOLDEN / "eagle3_sglang", norm_output=True)[0].warnings
    assert not open_head(GOLDEN / "speculators_norm_output")[0].warnings


def test_a_wrong_number_of_layers_is_only_pointed_out(tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["transformer_layer_config"]["num_hidden_layers"] = 36

    checkpoint = check_logits(rewrite(REDUCED, tmp_path / "head", config=change))
    assert any("says 36 draft layers" in warning for warning in checkpoint.warnings)


def test_a_map_that_was_never_filled_is_rebuilt(tmp_path: Path) -> None:
    folder = rewrite(REDUCED, tmp_path / "head", tensors=lambda tensors: tensors["d2t"].zero_())
    _, head, warnings = open_head(folder)
    _, original, _ = open_head(GOLDEN / REDUCED)
    assert head.draft_to_target is not None
    assert original.draft_to_target is not None
    assert torch.equal(head.draft_to_target, original.draft_to_target)
    assert any("rebuilt" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("settings", "theta", "kind"),
    [
        ({}, 10000.0, "default"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7.0}}, 5e5, "default"),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"rope_theta": 8.0}}, 7.0, "default"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 8.0}}, 8.0, "linear"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2}},
            10000.0,
            "linear",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}, "rope_theta": 1e6}, 1e6, "default"),
        ({"rope_scaling": None, "rope_theta": None}, 10000.0, "default"),
    ],
)
def test_the_base_is_the_heads_own(settings: dict[str, Any], theta: float, kind: str, tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        layer = fields["transformer_layer_config"]
        layer.pop("rope_parameters")
        layer.update(settings)

    checkpoint = open_head(rewrite(REDUCED, tmp_path / "head", config=change))[0]
    assert (checkpoint.spec.rope.theta, checkpoint.spec.rope.rope_type) == (theta, kind)
    assert open_head(tmp_path / "head", rope_theta=3.0)[0].spec.rope.theta == 3.0


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"sliding_window": 7}, None),
        ({"sliding_window": 7, "use_sliding_window": False}, None),
        ({"sliding_window": 7, "use_sliding_window": True}, 7),
        ({"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 28}, None),
        ({"sliding_window": 7, "layer_types": ["full_attention"], "use_sliding_window": True}, None),
        ({"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}, 7),
    ],
)
def test_a_window_must_be_asked_for(settings: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    folder = rewrite(
        REDUCED, tmp_path / "head", config=lambda fields: fields["transformer_layer_config"].update(settings)
    )
    assert open_head(folder)[0].spec.windows == (window,)
