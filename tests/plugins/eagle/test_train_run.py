"""Whole runs of the trainer: resumed, cached, interrupted, loaded again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import handle_of
from safetensors.torch import load_file
from tiny_targets import VOCABULARY, make_target, write_texts

from specplug_eagle.checkpoint import EagleCheckpoint
from specplug_eagle.train import loop
from specplug_eagle.train.__main__ import INTERRUPTED, main
from specplug_eagle.train.target import Target


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_target(folder / "target")
    make_target(folder / "other", seed=5)
    write_texts(folder / "data.jsonl")
    write_texts(folder / "held_out.jsonl", 4, seed=7)
    return folder


def run(world: Path, out: Path, *more: str, target: str = "target") -> int:
    return main(
        [
            *("--target", str(world / target), "--data", str(world / "data.jsonl"), "--out", str(out)),
            *("--held-out", str(world / "held_out.jsonl"), "--device", "cpu", "--save-dtype", "float32"),
            *("--steps", "3", "--batch-tokens", "48", "--accumulate", "2", "--epochs", "3", "--learning-rate", "1e-2"),
            *("--draft-vocab-size", "40", *more),
        ]
    )


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, torch.Tensor]:
    assert run(world, world / "whole") == 0
    return load_file(world / "whole" / "model.safetensors")


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGINT) -> None:
    """A signal in the middle of a step."""
    true, done = loop.Trainer._step, []

    def step(self: loop.Trainer, *args: Any) -> torch.Tensor:
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), number)
        return true(self, *args)

    monkeypatch.setattr(loop.Trainer, "_step", step)


@pytest.mark.parametrize(("steps", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM), (4, signal.SIGINT)])
def test_an_interrupted_and_resumed_run_gives_the_same_weights(
    world: Path,
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    number: signal.Signals,
) -> None:
    with monkeypatch.context() as patch:
        stop_after(steps, patch, number)
        assert run(world, tmp_path) == INTERRUPTED
    assert run(world, tmp_path) == 1  # only --resume goes on
    assert run(world, tmp_path, "--resume") == 0
    resumed = load_file(tmp_path / "model.safetensors")
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    records = [json.loads((folder / "training.json").read_text())["epochs"] for folder in (tmp_path, world / "whole")]
    resumed_run, whole_run = ([epoch["held_out"] for epoch in record] for record in records)
    assert resumed_run == whole_run
    assert run(world, tmp_path, "--resume") == 0  # nothing is left to do


def test_a_run_that_was_killed_continues_from_its_last_state(
    world: Path, whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, done = loop.Trainer._step, []

    def step(self: loop.Trainer, *args: Any) -> torch.Tensor:
        done.append(1)
        if len(done) == 5:
            raise RuntimeError("power failure")
        return true(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", step)
        with pytest.raises(RuntimeError, match="power failure"):
            run(world, tmp_path, "--save-every", "1")
    assert run(world, tmp_path, "--resume", "--save-every", "1") == 0
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, whole[name]), name


def test_a_resumed_run_must_have_the_same_settings(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert run(world, tmp_path) == INTERRUPTED
    assert run(world, tmp_path, "--resume", "--norm-output") == 1
    assert "other settings (head)" in capsys.readouterr().err
    assert run(world, tmp_path, "--resume", target="other") == 1
    assert "other settings (target)" in capsys.readouterr().err
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:500])
    assert run(world, tmp_path, "--resume") == 1
    assert "damaged" in capsys.readouterr().err


def test_a_cache_gives_the_same_weights_and_is_used_again(
    world: Path, whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ("--cache", str(tmp_path / "cache"))
    assert run(world, tmp_path / "first", *cache) == 0
    monkeypatch.setattr(Target, "states", None)
    assert run(world, tmp_path / "second", *cache) == 0
    for out in ("first", "second"):
        for name, tensor in load_file(tmp_path / out / "model.safetensors").items():
            assert torch.allclose(tensor, whole[name], atol=1e-4), name


def test_a_cache_of_something_else_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ("--cache", str(tmp_path / "cache"), "--max-steps", "1")
    assert run(world, tmp_path / "first", *cache) == 0
    for change, told in (
        (("--layer-ids", "1,4,8"), "other layer ids ([2, 4, 5], not [1, 4, 8])"),
        (("--max-length", "13"), "other data"),
        (("--dtype", "bfloat16"), "another target"),
    ):
        assert run(world, tmp_path / "second", *cache, *change) == 1
        assert told in capsys.readouterr().err
    assert run(world, tmp_path / "second", *cache, target="other") == 1
    assert "another target" in capsys.readouterr().err
    (tmp_path / "cache" / "cache.json").write_text("{")
    assert run(world, tmp_path / "second", *cache) == 1
    assert "damaged" in capsys.readouterr().err


def test_an_interrupted_cache_is_completed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specplug_eagle.train.batches import collate
    from specplug_eagle.train.data import read_samples
    from specplug_eagle.train.states import CachedStates, LiveStates

    target = Target.load(str(world / "target"), device="cpu")
    samples = read_samples(world / "data.jsonl", None, VOCABULARY, 2048)
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"batch_tokens": 48, "shard_bytes": 1}
    with pytest.raises(KeyboardInterrupt):
        CachedStates(tmp_path, target, (2, 4, 8), samples, "data", progress=stop, **options)
    calls.clear()
    states = CachedStates(
        tmp_path, target, (2, 4, 8), samples, "data", progress=lambda d, t: calls.append(d), **options
    )
    assert len(calls) < len(list(tmp_path.glob("*.safetensors")))
    live = LiveStates(target, (2, 4, 8))
    for indices in ((0, 5), (11, 3, 4)):
        batch = collate(samples, indices, target.device)
        for row, index in enumerate(indices):
            real = slice(0, len(samples[index]))
            for part in ("features", "final"):
                stored, computed = getattr(states(batch), part)[row, real], getattr(live(batch), part)[row, real]
                assert torch.allclose(stored, computed, atol=1e-4)


def test_the_written_head_opens_with_this_plugin(world: Path, whole: dict[str, torch.Tensor]) -> None:
    handle = handle_of(world / "whole")
    checkpoint = EagleCheckpoint.open(handle)
    assert checkpoint.spec.layer_ids == (2, 4, 5)
    assert checkpoint.spec.norm_before_residual
    assert checkpoint.spec.draft_vocab_size == 40
    assert not checkpoint.spec.has_own_embedding
    handle.keep(checkpoint.names.values())
    handle.materialize(lambda done: None)
    head, warnings = checkpoint.build(handle.tensors, embed=lambda ids: ids)
    assert not warnings
    assert head.draft_to_target is not None
    config = json.loads((world / "whole" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]


def test_a_run_that_is_limited_in_time_ends_its_schedule_then(world: Path, tmp_path: Path) -> None:
    assert run(world, tmp_path, "--max-minutes", "0.00001") == 0
    (epoch,) = json.loads((tmp_path / "training.json").read_text())["epochs"]
    assert epoch["step"] == 1
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "state.pt").exists()
