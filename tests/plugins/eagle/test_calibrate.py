"""Calibration finds the reading that a head was made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_targets import make_target, write_lines

from specplug_eagle.calibrate import main
from specplug_eagle.train.__main__ import main as train
from support.marks import slow_except

BOUNDARIES = (3, 4, 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, and a head that is trained with one reading until it drafts well."""
    folder = tmp_path_factory.mktemp("world")
    target = make_target(folder / "target", spread=0.08)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, target.vocab_size, (250, 5), generator=generator).tolist()
    write_lines(folder / "prompts.jsonl", [{"input_ids": prompt, "loss_from": 5} for prompt in prompts])
    status = train(
        [
            *(
                "--target",
                str(folder / "target"),
                "--data",
                str(folder / "prompts.jsonl"),
                "--out",
                str(folder / "head"),
            ),
            *("--regenerate", "--regenerate-tokens", "24", "--regenerate-batch", "125", "--device", "cpu"),
            *(
                "--steps",
                "3",
                "--epochs",
                "12",
                "--batch-tokens",
                "1024",
                "--accumulate",
                "1",
                "--learning-rate",
                "1e-2",
            ),
            *("--layer-ids", ",".join(map(str, BOUNDARIES)), "--norm-output", "--save-dtype", "float32"),
        ]
    )
    assert status == 0
    write_lines(folder / "few.jsonl", [{"input_ids": prompt, "loss_from": 5} for prompt in prompts[:20]])
    return folder


def misread(world: Path, folder: Path, ids: list[int], **layer: Any) -> Path:
    """The same weights with a configuration in the layout that leaves the convention open."""
    folder.mkdir()
    save_file(load_file(world / "head" / "model.safetensors"), folder / "model.safetensors")
    stored = json.loads((world / "head" / "config.json").read_text())
    config = {**stored["transformer_layer_config"], "draft_vocab_size": stored["draft_vocab_size"], **layer}
    config |= {"architectures": ["LlamaForCausalLMEagle3"], "eagle_aux_hidden_state_layer_ids": ids}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def calibrated(world: Path, head: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    arguments = ["--target", str(world / "target"), "--head", str(head), "--device", "cpu", "--tokens", "400"]
    assert main([*arguments, "--prompts", str(world / "few.jsonl"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("ids", "convention"),
    slow_except([([2, 3, 7], "output"), ([3, 4, 8], "boundary")], ([2, 3, 7], "output")),
)
def test_the_convention_that_the_head_was_trained_with_is_found(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: list[int], convention: str
) -> None:
    head = misread(world, tmp_path / "head", ids, norm_before_residual=True, norm_output=True)
    report = calibrated(world, head, capsys)
    best = report["readings"][0]
    assert tuple(best["boundaries"]) == BOUNDARIES
    assert best["layer_id_convention"] == convention
    assert best["agreement"][0] > 0.5
    other = [reading for reading in report["readings"] if tuple(reading["boundaries"]) != BOUNDARIES]
    assert len(other) == (0 if convention == "boundary" else len(report["readings"]) // 2)
    assert all(reading["agreement"][0] < best["agreement"][0] for reading in other)
    assert report["settings"].get("layer_id_convention", "boundary") == convention


@pytest.mark.slow
def test_flags_without_a_trace_in_the_tensors_are_found(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = misread(world, tmp_path / "head", [3, 4, 8], norm_before_residual=False, norm_output=False)
    report = calibrated(world, head, capsys)
    assert report["settings"]["norm_before_residual"] is True
    assert report["settings"]["norm_output"] is True
    (own,) = [reading for reading in report["readings"] if reading["as_configured"]]
    assert own["acceptance_length"] < report["readings"][0]["acceptance_length"]


@pytest.mark.slow
def test_a_base_that_differs_from_the_default_is_measured_against_it(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {"rope_theta": 30.0, "rope_type": "default"}
    options: dict[str, Any] = {"norm_before_residual": True, "norm_output": True}
    head = misread(world, tmp_path / "head", [3, 4, 8], rope_theta=30.0, rope_parameters=rope, **options)
    report = calibrated(world, head, capsys)
    assert {reading["rope_theta"] for reading in report["readings"]} == {30.0, 10000.0}
    assert report["settings"] == {"rope_theta": 10000.0}


def test_the_table_names_the_settings(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--target", str(world / "target"), "--head", str(world / "head"), "--device", "cpu"]
    assert main([*arguments, "--prompts", str(world / "few.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "as configured" in shown
    assert "best: as configured; nothing to set" in shown


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"--head": "nowhere/at/all"}, "not a folder with a draft head"),
        ({"--target": "/nonexistent"}, "cannot be loaded"),
        ({"--prompts": "/nonexistent.jsonl"}, "cannot be read"),
    ],
)
def test_bad_input_is_one_clear_error(
    world: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], told: str
) -> None:
    given = {"--target": str(world / "target"), "--head": str(world / "head"), "--prompts": str(world / "few.jsonl")}
    assert main([part for pair in (given | change).items() for part in pair]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_head_for_another_target_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "other"
    target = make_target()
    config = type(target.model.config)(**{**target.model.config.to_dict(), "vocab_size": 64})
    type(target.model)(config).save_pretrained(folder)
    arguments = ["--target", str(folder), "--head", str(world / "head"), "--prompts", str(world / "few.jsonl")]
    assert main(arguments) == 1
    assert "vocabulary of 48 tokens, but the target's has 64" in capsys.readouterr().err
