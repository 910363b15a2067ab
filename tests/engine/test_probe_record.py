"""A parity verdict holds for what computed it, whatever the model's folder is called, and is kept where it can be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specplug import LLM, native
from specplug.model.compile.artifacts import cache_key, config_facts
from specplug.model.load import parity
from specplug.model.load.parity import check_parity
from specplug.model.runner import ModelRunner
from support.models import save_model


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelRunner]:
    native.load()  # from the usual cache
    monkeypatch.setenv("SPECPLUG_CACHE", str(tmp_path / "cache"))
    folder = save_model(tmp_path / "model", "llama")
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", check_parity=False) as llm:
        yield llm.engine.runner


def has_probed(runner: ModelRunner) -> bool:
    config: Any = runner.model.config
    return check_parity(runner, config, 16)


def test_other_kernels_and_other_gpus_are_probed_anew(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_probed(runner)
    assert not has_probed(runner)
    with monkeypatch.context() as patch:
        patch.setattr(native, "key", lambda: "kernels-of-another-compiler")
        assert has_probed(runner) == runner.attends_natively
    with monkeypatch.context() as patch:
        patch.setattr(parity, "device_name", lambda device: "a GPU (9, 0)")
        assert has_probed(runner)
    assert not has_probed(runner)


def test_names_of_folders_and_versions_make_no_other_model(runner: ModelRunner) -> None:
    assert has_probed(runner)
    config: Any = runner.model.config
    config._name_or_path = "somewhere/else"
    assert not has_probed(runner)
    config.rope_theta = 7.0
    assert has_probed(runner)

    class Nested:
        def to_dict(self) -> dict[str, Any]:
            return {
                "text_config": {"_name_or_path": "x", "layers": 2},
                "transformers_version": "1",
                "_name_or_path": "x",
            }

    assert config_facts(Nested()) == {"text_config": {"layers": 2}}
    assert cache_key("a", {"b": 1}) != cache_key("a", {"b": 2})


def test_a_record_that_others_could_have_written_is_not_believed(runner: ModelRunner, tmp_path: Path) -> None:
    assert has_probed(runner)
    record = tmp_path / "cache" / "parity.json"
    assert record.stat().st_mode & 0o777 == 0o600
    record.chmod(0o622)
    assert has_probed(runner)
    record.chmod(0o600)
    (tmp_path / "cache").chmod(0o777)
    assert has_probed(runner)
    (tmp_path / "cache").chmod(0o700)
    assert not has_probed(runner)
