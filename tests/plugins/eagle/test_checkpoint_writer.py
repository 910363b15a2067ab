"""The speculators format, written and read back. `golden/make_speculators.py check` asks the speculators package itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from attention_forms import unrolled_logits
from checkpoint_files import CASES, GOLDEN, golden_of, handle_of, open_head
from safetensors.torch import load_file

from specplug.errors import ConfigurationError
from specplug_eagle.checkpoint import EagleCheckpoint, resolve_layer_ids, write_speculators_checkpoint
from specplug_eagle.head import DraftHead, HeadSpec, RopeSpec

pytestmark = pytest.mark.unit

UNWRITABLE = ("eagle1", "eagle3_single_state", "eagle3_partial_rotary")
WRITABLE = [case for case in CASES if not case.startswith(UNWRITABLE)]
SPEC = HeadSpec("eagle3", 16, 16, 40, 24, 4, 2, 4, 24)


@pytest.mark.parametrize("case", WRITABLE)
def test_what_is_written_is_read_back_as_the_same_head(case: str, tmp_path: Path) -> None:
    features, ids, expected = golden_of(GOLDEN / case)
    checkpoint, head, _ = open_head(GOLDEN / case)
    boundaries = resolve_layer_ids(checkpoint.spec, 8).boundaries
    folder = write_speculators_checkpoint(tmp_path / "out", head, verifier="org/target", boundaries=boundaries)
    golden = (GOLDEN / case).with_suffix(".safetensors")
    folder.with_suffix(".safetensors").write_bytes(golden.read_bytes())
    again, copy, warnings = open_head(folder)
    assert not warnings
    assert not again.warnings
    expected_spec = attrs.evolve(checkpoint.spec, layer_ids=boundaries, layout="speculators")
    assert again.spec == expected_spec
    assert resolve_layer_ids(again.spec, 8).boundaries == boundaries
    with torch.no_grad():
        for step, logits in enumerate(unrolled_logits(copy, features, ids, 4)):
            torch.testing.assert_close(logits, expected[step, : len(ids) - step], atol=1e-5, rtol=0)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_new_head_is_written_with_its_vocabulary_and_embedding(tmp_path: Path) -> None:
    ids = torch.arange(24) + 7
    head = DraftHead(SPEC, dtype=torch.bfloat16, draft_to_target=ids)
    table = torch.randn(40, 16)
    write_speculators_checkpoint(
        tmp_path, head, verifier=None, boundaries=[2, 4, 5], speculative_tokens=5, embedding=table
    )
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], table)
    assert tensors["d2t"].tolist() == [7] * 24
    assert tensors["t2d"].nonzero().flatten().tolist() == ids.tolist()
    assert tensors["fc.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert EagleCheckpoint.open(handle_of(tmp_path)).spec.has_own_embedding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "eagle1", "num_aux_states": 1}, "EAGLE-1"),
        ({"single_state": True, "num_aux_states": 1}, "heads without fc"),
        ({"fc_bias": True}, "bias of fc"),
        ({"rope": RopeSpec(partial_rotary_factor=0.5)}, "partial rotary"),
        ({"qkv_bias": True}, "biases of q, k and v alone"),
        ({"num_layers": 3, "windows": (3, 4, None)}, "different windows"),
    ],
)
def test_what_the_format_cannot_say_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    head = DraftHead(attrs.evolve(SPEC, **change))
    with pytest.raises(ConfigurationError, match=message):
        write_speculators_checkpoint(tmp_path / "out", head, verifier="org/target")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    head = DraftHead(SPEC)
    with pytest.raises(ConfigurationError, match="2 boundaries were given for a head that reads 3"):
        write_speculators_checkpoint(tmp_path, head, verifier=None, boundaries=[1, 2])
    with pytest.raises(ConfigurationError, match=r"\[3, 3\], but the head needs \[40, 16\]"):
        write_speculators_checkpoint(tmp_path, head, verifier=None, embedding=torch.zeros(3, 3))
