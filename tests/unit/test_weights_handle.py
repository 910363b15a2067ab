"""Weights that a speculator opens for itself: safetensors or a pickle of tensors, all of them or some."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import specplug
from specplug.errors import CheckpointError, PluginError
from specplug.model.load.checkpoint import read_headers, resolve_checkpoint
from specplug.plugins.lazy_model import LazyModel
from specplug.plugins.lazy_weights import LazyWeights

CPU = torch.device("cpu")


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "half": torch.randn(3, 4).half(),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "turned": torch.randn(2, 6).T,
        "wide": torch.randn(7, 5),
    }


def _pickled(folder: Path) -> None:
    torch.save(tensors(), folder / "pytorch_model.bin")


def _parameters(folder: Path) -> None:
    held = {name: torch.nn.Parameter(one) if one.is_floating_point() else one for name, one in tensors().items()}
    torch.save(held, folder / "pytorch_model.bin")


def _old_pickled(folder: Path) -> None:
    torch.save(tensors(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _sharded(folder: Path) -> None:
    held, index = tensors(), {}
    for number, names in enumerate((["half", "ids"], ["mask", "turned", "wide"])):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({name: held[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")


def _safe(folder: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors().items()}, folder / "model.safetensors")


FORMS: dict[str, Callable[[Path], None]] = {
    "bin": _pickled,
    "bin of parameters": _parameters,
    "bin before torch 1.6": _old_pickled,
    "sharded bin": _sharded,
    "safetensors": _safe,
}


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> LazyWeights:
    return LazyWeights(str(folder), None, dtype, CPU)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path)
    handle, held = opened(tmp_path), tensors()
    assert dict(handle.shapes) == {name: tuple(tensor.shape) for name, tensor in held.items()}
    assert dict(handle.dtypes) == {name: tensor.dtype for name, tensor in held.items()}
    assert handle.num_bytes() == 4 * (12 + 12 + 35) + 8 * 5 + 2
    assert handle.num_bytes(torch.bfloat16) == 2 * (12 + 12 + 35) + 8 * 5 + 2
    with pytest.raises(PluginError, match="from warmup on"):
        assert handle.tensors
    done: list[float] = []
    handle.materialize(done.append)
    assert done[-1] == 1.0
    assert set(handle.tensors) == set(held)
    for name, tensor in handle.tensors.items():
        expected = held[name].float() if held[name].is_floating_point() else held[name]
        assert torch.equal(tensor, expected)
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_kept_is_neither_planned_nor_read(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path)
    handle = opened(tmp_path)
    handle.keep(["wide", "ids"])
    assert set(handle.shapes) == set(tensors())
    assert handle.num_bytes() == 4 * 35 + 8 * 5
    handle.keep(["ids"])
    handle.materialize(lambda done: None)
    assert set(handle.tensors) == {"ids"}
    with pytest.raises(PluginError, match="after the weights were loaded"):
        handle.keep(["ids"])


def test_a_name_that_is_not_there_cannot_be_kept(tmp_path: Path) -> None:
    _safe(tmp_path)
    with pytest.raises(PluginError, match="no tensor 'nope'"):
        opened(tmp_path).keep(["wide", "nope"])


@pytest.mark.parametrize("form", [form for form in FORMS if "bin" in form])
def test_loaded_tensors_outlive_their_file(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path)
    handle = opened(tmp_path)
    handle.materialize(lambda done: None)
    for file in tmp_path.iterdir():
        size = file.stat().st_size
        with file.open("r+b") as stream:
            stream.write(b"\xff" * size)
    for name, tensor in tensors().items():
        assert torch.equal(handle.tensors[name].to(tensor.dtype), tensor)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    _safe(tmp_path)
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert "other" not in opened(tmp_path).shapes


def test_shapes_are_known_without_reading_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"large": torch.zeros(64, 1024, 1024, dtype=torch.uint8)}, tmp_path / "pytorch_model.bin")
    devices: list[Any] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kw: devices.append(kw["map_location"]) or load(*args, **kw))
    assert opened(tmp_path).shapes == {"large": (64, 1024, 1024)}
    assert devices == [torch.device("meta")]


class _Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (lambda trace: {"a": torch.ones(1), "evil": _Evil(trace)}, "holds more than tensors, which is never unpickled"),
        (lambda trace: torch.nn.Linear(2, 2), "holds more than tensors, which is never unpickled"),
        (lambda trace: {"a": torch.ones(1), "step": 3}, "holds more than tensors: 'step' is a int"),
        (lambda trace: {"state_dict": {"a": torch.ones(1)}}, "holds more than tensors: 'state_dict' is a dict"),
        (lambda trace: {5: torch.ones(1)}, "holds more than tensors: '5'"),
        (lambda trace: {"a": torch.eye(2).to_sparse()}, "holds more than tensors: 'a'"),
        (lambda trace: [torch.ones(1)], "holds a list, not tensors by name"),
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_of_anything_else_is_refused(held: Any, message: str, new: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save(held(trace), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match=message) as raised:
        opened(tmp_path)
    assert "pytorch_model.bin" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not trace.exists()


@pytest.mark.parametrize("form", ["bin", "bin before torch 1.6", "sharded bin"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.2, 0.5, 0.99])
def test_a_truncated_pickle_is_named(form: str, part: float, tmp_path: Path) -> None:
    FORMS[form](tmp_path)
    file = max(tmp_path.glob("*.bin"))
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"\.bin .*damaged.*; download it again"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>" * 20, b"version https://git-lfs", b"PK\x03\x04" + b"a" * 99]
)
def test_a_file_that_is_no_pickle_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "pytorch_model-00002-of-00002.bin").unlink(), "lacks 1 of 2 weight files.*00002-of"),
        (lambda folder: (folder / "pytorch_model.bin.index.json").unlink(), "no pytorch_model.bin.index.json"),
        (lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{"), "index.json is damaged"),
        (
            lambda folder: (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": 3}'),
            "index.json is damaged",
        ),
    ],
)
def test_incomplete_shards_are_named(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    _sharded(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path)


def test_other_pickles_are_not_weights(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "training_args.bin")
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        opened(tmp_path)


def test_models_are_never_unpickled(tmp_path: Path) -> None:
    _pickled(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="is a pickle: convert it to safetensors"):
        read_headers(tmp_path)
    with pytest.raises(CheckpointError, match="is a pickle: convert it to safetensors"):
        LazyModel(str(tmp_path), None, None, torch.float32, CPU, "model", max_num_seqs=1)


@pytest.mark.parametrize(
    ("files", "allowed", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin"], True, [False]),
        (["pytorch_model.bin"], True, [False, True]),
        (["pytorch_model.bin"], False, [False]),
    ],
)
def test_pickles_are_fetched_only_where_they_must_be(
    files: list[str], allowed: bool, expected: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fnmatch import fnmatch

    fetched: list[bool] = []

    def download(source: str, revision: str | None, allow_patterns: list[str]) -> str:
        for file in [*files, "config.json", "training_args.bin", "code.py"]:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        fetched.append((tmp_path / "pytorch_model.bin").exists())
        return str(tmp_path)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_checkpoint("org/head", pickles=allowed) == tmp_path
    assert fetched == expected
    assert not (tmp_path / "training_args.bin").exists()
    assert not (tmp_path / "code.py").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', b"\xff\xfe"])
def test_a_damaged_configuration_is_named(text: str | bytes, tmp_path: Path) -> None:
    _safe(tmp_path)
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"config.json is damaged.*download it again"):
        assert opened(tmp_path).config


def test_the_configuration_is_as_it_is(tmp_path: Path) -> None:
    _safe(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        assert opened(tmp_path).config
    raw = {"speculators_model_type": "eagle3", "rope_theta": None}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    assert opened(tmp_path).config == raw


def test_the_handle_is_what_the_contract_says(tmp_path: Path) -> None:
    from specplug.contract.models import WeightsHandle

    _safe(tmp_path)
    handle = opened(tmp_path)
    public = [name for name in vars(WeightsHandle) if not name.startswith("_")] + list(WeightsHandle.__annotations__)
    assert {"folder", "shapes", "dtypes", "config", "keep", "num_bytes", "tensors", "release"} == set(public)
    assert all(hasattr(type(handle), name) or hasattr(handle, name) for name in public)
    assert specplug.WeightsHandle is WeightsHandle
