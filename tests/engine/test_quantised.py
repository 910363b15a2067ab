"""Quantised targets: what Transformers generates from the same checkpoint, in the bytes that were planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, SamplingParams
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from specplug.engine.startup import allocation
from specplug.errors import CheckpointError
from specplug.model.load.quantised import becomes_dense
from specplug.model.load.weights import load_model
from support.held import held_bytes
from support.models import save_model
from support.quantised import DTYPES, KINDS, decided_pairs, save_quantised, save_with_settings

NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


def saved(root: Path, kind: str, dtype: str = "float32") -> Path:
    dtype = DTYPES.get(kind, dtype)
    folder = root / dtype / kind / kind
    return folder if folder.exists() else save_quantised(root / dtype / kind, kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers_generate_of_the_same_checkpoint(root: Path, kind: str) -> None:
    folder = saved(root, kind)
    draft = save_model(root / kind / "draft", "llama", seed=1, num_hidden_layers=1)
    pairs = decided_pairs(folder, kind, 3, NEW_TOKENS)
    methods: list[dict[str, Any] | None] = [
        None,
        {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
        {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3},
    ]
    for method in methods:
        with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", speculative_config=method) as llm:
            outputs = [output.outputs[0].token_ids for output in llm.generate([p for p, _ in pairs], GREEDY)]
        assert [ids[: len(own)] for ids, (_, own) in zip(outputs, pairs, strict=True)] == [own for _, own in pairs]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_the_stored_bytes(root: Path, kind: str, dtype: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = saved(root, kind, dtype)
    capfd.readouterr()
    plan = plan_engine(EngineConfig(model=str(folder), skip_tokenizer_init=True, memory=64 << 20))
    if becomes_dense(plan.model_config) or kind in ("gptq", "awq"):  # in the first forward
        with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
            llm.generate([[5, 6, 7]], GREEDY)
            held = held_bytes(llm.engine.runner.model)
    else:
        held = held_bytes(load_model(folder, plan.model_config, plan.dtype, CPU))
    assert held == pytest.approx(plan.facade.weight_bytes, rel=0.02)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("kind", ["compressed-tensors-int4", "torchao-int8"])
def test_a_quantised_draft_runs_in_its_own_dtype(root: Path, tmp_path: Path, kind: str) -> None:
    target = save_model(tmp_path, "llama")
    method = {"method": "draft_model", "model": str(saved(root, kind, "bfloat16")), "num_speculative_tokens": 3}
    with LLM(target, skip_tokenizer_init=True, strict=True, memory="64MiB") as llm:
        plain = llm.generate([[5, 6, 7, 8]], GREEDY)[0].outputs[0].token_ids
    with LLM(target, skip_tokenizer_init=True, strict=True, memory="64MiB", speculative_config=method) as llm:
        assert llm.generate([[5, 6, 7, 8]], GREEDY)[0].outputs[0].token_ids == plain


def test_quantised_weights_are_not_compiled(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tracing tensor subclasses ends the process in PyTorch 2.13."""
    with LLM(saved(root, "torchao-int8"), skip_tokenizer_init=True, memory="64MiB", compile=True) as llm:
        assert llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids
    assert "runs uncompiled: its weights are quantised" in caplog.text or "native kernels are not there" in caplog.text


def test_another_dtype_than_the_checkpoints_own_is_refused(root: Path) -> None:
    with pytest.raises(CheckpointError, match="quantised by torchao for float32; they do not run in bfloat16"):
        LLM(saved(root, "torchao-int8"), skip_tokenizer_init=True, dtype="bfloat16")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised by gptq, and a package .* is not installed .*; install it"),
        ({"quant_method": "awq", "bits": 4}, r"quantised by awq, and a package .* is not installed .*gptqmodel"),
        ({"quant_method": "nonsense"}, r"quantised by nonsense, which Transformers cannot load here"),
    ],
)
def test_what_cannot_be_read_is_refused_before_weights_are_read(
    tmp_path: Path, settings: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "load_model", lambda *args, **kwargs: pytest.fail("weights were read"))
    if settings["quant_method"] in ("gptq", "awq"):
        try:
            import gptqmodel  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("gptqmodel is installed")
    folder = save_with_settings(save_model(tmp_path, "llama"), settings)
    with pytest.raises(CheckpointError, match=text):
        LLM(folder, skip_tokenizer_init=True)
