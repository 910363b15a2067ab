"""Every model that cannot be run is refused from its configuration, in one short line that says why and what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from specplug.errors import UnsupportedModelError
from specplug.model.architecture import inspection
from specplug.model.architecture.architecture import Architecture
from specplug.model.architecture.inspection import inspect_architecture
from support.models import make_config

LONGEST = 300
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
}
DECODER: dict[str, Any] = {
    **SIZES,
    "decoder_layers": 3,
    "d_model": 32,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "is_encoder_decoder": False,
    "is_decoder": True,
}
WRAPPER: dict[str, Any] = {}  # their defaults


def refusal(architecture: str, options: dict[str, Any]) -> str:
    config = AutoConfig.for_model(architecture, **options)
    with pytest.raises(UnsupportedModelError) as caught:
        inspect_architecture(config, torch.bfloat16)
    return str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "options", "text"),
    [
        ("hrm_text", SIZES, "calls? Transformers' attention interface"),
        ("diffllama", SIZES, "its 3 layers call Transformers' attention interface 6 times in one forward"),
        ("bloom", SIZES, "does not use Transformers' attention interface"),
        ("falcon", SIZES, "does not use Transformers' attention interface"),
        ("gptj", SIZES, "does not use Transformers' attention interface"),
        ("axk1", {**SIZES, "head_dim": 8}, "cannot be run with the sizes in config.json"),
        ("flex_olmo", {**SIZES, "pad_token_id": 999}, "Padding_idx must be within num_embeddings"),
        ("bert", SIZES, "its attention is not causal"),
        ("roberta", SIZES, "its attention is not causal"),
        ("roberta", {**SIZES, "is_decoder": True}, "'roberta.embeddings' numbers positions from padding_idx [+] 1"),
        ("xlm-roberta", {**SIZES, "is_decoder": True}, "numbers positions from padding_idx"),
        ("bart", SIZES, "is an encoder-decoder"),
        ("bart", DECODER, "ignores position_ids: 'model.decoder.embed_positions' counts positions itself"),
        ("mbart", DECODER, "ignores position_ids"),
        ("musicgen", WRAPPER, "several text models"),
        ("siglip", WRAPPER, "not a causal language model of Transformers .*; give a text-only checkpoint"),
        ("paligemma", WRAPPER, "its attention is not causal"),
        ("t5", WRAPPER, "not a causal language model of Transformers"),
    ],
)
def test_a_refused_model_gets_one_short_line_with_the_true_reason(
    architecture: str, options: dict[str, Any], text: str
) -> None:
    message = refusal(architecture, options)
    assert re.search(text, message), message
    assert f"'{architecture}'" in message
    assert len(message) <= LONGEST, message
    assert "\n" not in message
    for foreign in ("register_meta", "Unrecognized configuration", "Mismatching argument", "aten::"):
        assert foreign not in message


def test_types_whose_configuration_insists_on_a_padding_id_are_traced_as_well() -> None:
    config = AutoConfig.for_model("modernbert-decoder", **SIZES)
    config.layer_types = ["full_attention"] * 3
    assert len(inspect_architecture(config, torch.float32).layers) == 3


def test_a_bert_that_was_trained_as_a_decoder_is_not_refused() -> None:
    config = AutoConfig.for_model("bert", **SIZES, is_decoder=True)
    assert len(inspect_architecture(config, torch.float32).layers) == 3


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 160}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("rope", "positions", "length"),
    [
        (YARN, 160, 640),  # left at the original length, as model cards tell their readers to
        (YARN, 640, 640),
        (YARN, 1000, 1000),
        (LINEAR, 160, 320),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 160, 160),
        ({"rope_type": "default", "rope_theta": 1e4}, 160, 160),
        (
            {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 40,
            },
            160,
            160,
        ),
    ],
)
def test_scaled_rope_serves_as_many_positions_as_it_was_scaled_for(
    rope: dict[str, Any], positions: int, length: int
) -> None:
    config = make_config("llama", rope_parameters=dict(rope), max_position_embeddings=positions)
    assert inspect_architecture(config, torch.float32).context_length == length


def test_layers_with_scaled_rope_beside_others_do_not_lengthen_the_context() -> None:
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": dict(LINEAR)}
    config = make_config("gemma3_text", rope_parameters=rope)
    assert inspect_architecture(config, torch.float32).context_length == 160


def test_a_model_is_traced_once_for_all_its_folders_and_again_for_what_changes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced: list[str] = []
    own = inspection.run_trace
    monkeypatch.setattr(inspection, "run_trace", lambda model, *rest: (traced.append(rest[0]), own(model, *rest))[1])

    def inspect(
        folder: str, dtype: torch.dtype = torch.float32, *, trust: bool = False, **changes: int
    ) -> Architecture:
        config = make_config("llama", vocab_size=77, **changes)
        config.name_or_path = folder
        found = inspection.inspect_architecture(config, dtype, trust_remote_code=trust)
        assert config.name_or_path == folder
        return found

    assert inspect("a") is inspect("b")
    assert len(traced) == 1
    assert inspect("a", torch.bfloat16).weight_bytes < inspect("a").weight_bytes
    assert len(inspect("a", num_hidden_layers=1).calls) == 1
    assert len(traced) == 3
    assert inspect("a", trust=True) == inspect("a")  # its code may have changed
    assert len(traced) == 4
