"""What is loaded, from where, and what is refused before any weight is read."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, SamplingParams
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from specplug.engine.startup import allocation, start
from specplug.engine.startup.report import StepReport
from specplug.errors import CheckpointError, ConfigurationError, SpecplugError, StartupError, UnsupportedModelError
from specplug.model.load.parity import check_parity, measure_difference
from specplug.model.runner import ModelRunner
from support.models import ARCHITECTURES, make_config, save_model
from support.reference import generate

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test."""
    monkeypatch.setattr(allocation, "load_model", lambda *args, **kwargs: pytest.fail("weights were read"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("architecture", "text"),
    [
        ("falcon", "does not use Transformers' attention interface"),
        ("bloom", "has code of its own there"),
        ("minimax", "keeps a recurrent state in .* by code of its own"),
        ("axk2", "indexed_attention"),
    ],
)
def test_unsupported_models_are_refused_before_weights_are_read(tmp_path: Path, architecture: str, text: str) -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "n_layer": 3,
        "num_attention_heads": 4,
        "n_head": 4,
    }
    from transformers import AutoConfig

    AutoConfig.for_model(architecture, **sizes).save_pretrained(tmp_path)
    shutil.copy(save_model(tmp_path / "weights", "llama") / "model.safetensors", tmp_path)
    with pytest.raises(UnsupportedModelError, match=text):
        LLM(tmp_path, skip_tokenizer_init=True)


@pytest.mark.usefixtures("no_weights")
def test_length_dependent_rope_bounds_the_context(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope["original_max_position_embeddings"] = 64
    folder = save_model(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=64)
    planned = plan_engine(EngineConfig.create(str(folder), memory="64MiB"))
    assert planned.plan.max_model_len == 64
    with pytest.raises(ConfigurationError, match=r"more than the 64 positions .*beyond 64 tokens its longrope RoPE"):
        plan_engine(EngineConfig.create(str(folder), memory="64MiB", max_model_len=100))


@pytest.mark.usefixtures("no_weights")
def test_attention_in_chunks_bounds_the_context(tmp_path: Path) -> None:
    """Within the first chunk it is causal attention; `benchmarks/architectures.py` compares it with `generate`."""
    from transformers import AutoConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_local_experts": 2}
    AutoConfig.for_model("llama4_text", **sizes, attention_chunk_size=40).save_pretrained(tmp_path)
    shutil.copy(save_model(tmp_path / "weights", "llama") / "model.safetensors", tmp_path)
    planned = plan_engine(EngineConfig.create(str(tmp_path), memory="64MiB"))
    assert planned.plan.max_model_len == 40
    with pytest.raises(
        ConfigurationError, match=r"more than the 40 positions .*beyond 40 tokens its layers attend in chunks"
    ):
        plan_engine(EngineConfig.create(str(tmp_path), memory="64MiB", max_model_len=100))


def test_prompts_beyond_the_original_positions_of_scaled_rope_are_exact(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    folder = save_model(tmp_path, "qwen2", rope_parameters=rope, max_position_embeddings=32)
    prompt = [5 + index % 50 for index in range(70)]
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        assert llm.engine.plan.max_model_len == 128
        assert llm.generate([prompt], GREEDY)[0].outputs[0].token_ids == generate(folder, prompt, 6)[0]


def damage(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "config no JSON":
        (folder / "config.json").write_text("{")
    elif kind == "unknown type":
        (folder / "config.json").write_text('{"model_type": "nosuchmodel"}')
    elif kind == "no weights":
        weights.unlink()
    elif kind == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "truncated":
        weights.write_bytes(data[:-100])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "header damaged":
        weights.write_bytes(data[:8] + b"x" * length + data[8 + length :])
    elif kind == "shard missing":
        index = {"metadata": {}, "weight_map": dict.fromkeys(header, "model-00001-of-00002.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind in ("tensor missing", "tensor of another shape", "unknown dtype"):
        name = "model.layers.1.mlp.up_proj.weight"
        if kind == "tensor missing":
            header["renamed"] = header.pop(name)
        elif kind == "tensor of another shape":
            header[name]["shape"] = header[name]["shape"][::-1]
        else:
            header[name]["dtype"] = "F3"
        text = json.dumps(header).encode()
        weights.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("no config", "no config.json"),
        ("config no JSON", "is damaged"),
        ("unknown type", "nosuchmodel"),
        ("no weights", "no safetensors weights"),
        ("pickle only", "is a pickle"),
        ("truncated", "is truncated"),
        ("empty", "is damaged"),
        ("header damaged", "is damaged"),
        ("shard missing", "lacks 1 of 1 weight files"),
        ("tensor missing", "model.layers.1.mlp.up_proj.weight"),
        ("tensor of another shape", "model.layers.1.mlp.up_proj.weight"),
        ("unknown dtype", "F3"),
    ],
)
def test_damaged_checkpoints(folder: Path, tmp_path: Path, kind: str, text: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy, kind)
    with pytest.raises(CheckpointError, match=text):
        LLM(copy, skip_tokenizer_init=True, memory="64MiB")


@pytest.mark.parametrize("source", ["/no/such/folder", "./missing", "no-such-org/no-such-model"])
def test_checkpoints_that_are_nowhere(source: str) -> None:
    with pytest.raises(CheckpointError, match=source):
        LLM(source, skip_tokenizer_init=True)


def test_hub_names_and_revisions_come_from_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    repo = tmp_path / "models--acme--small"
    for commit, source in (("a" * 40, folder), ("b" * 40, save_model(tmp_path / "other", "llama", seed=5))):
        shutil.copytree(source, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "refs" / "v2").write_text("b" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    prompt = [3, 4, 5, 6, 7]
    for revision, source in ((None, folder), ("v2", tmp_path / "other")):
        with LLM("acme/small", revision=revision, skip_tokenizer_init=True, memory="64MiB") as llm:
            assert llm.generate([prompt], GREEDY)[0].outputs[0].token_ids == generate(source, prompt, 6)[0]
    with pytest.raises(CheckpointError, match="at revision 'v3'"):
        LLM("acme/small", revision="v3", skip_tokenizer_init=True)


def test_sharded_checkpoints_load(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    with LLM(tmp_path, skip_tokenizer_init=True, memory="64MiB") as llm:
        assert llm.generate([[3, 4, 5]], GREEDY)[0].outputs[0].token_ids == generate(folder, [3, 4, 5], 6)[0]


def test_dtype_of_the_checkpoint_or_as_asked(folder: Path) -> None:
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)):
        with LLM(folder, skip_tokenizer_init=True, dtype=dtype, memory="64MiB") as llm:
            assert llm.engine.runner.cache.keys[0].dtype == expected
            assert (
                len(llm.generate([[3, 4]], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids) == 3
            )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": "warp9"}, "device='warp9'"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens=32"),
        ({"max_model_len": 100_000}, "max_model_len=100,000"),
        ({"chain_verification": "fast"}, "chain_verification='fast'"),
        ({"speculative_config": {"num_speculative_tokens": 3}}, "needs 'method'"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": "5"}}, "num_speculative_tokens='5'"),
        ({"speculative_config": {"method": "ngrm"}}, "no speculator named 'ngrm'; did you mean 'ngram'"),
        ({"speculative_config": "ngram"}, "expected a mapping"),
        ({"max_sequences": 4}, "no option 'max_sequences'; did you mean 'max_num_seqs'"),
    ],
)
def test_bad_options(folder: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecplugError, match=text):
        LLM(folder, skip_tokenizer_init=True, **options)


def test_the_parity_probe_refuses_what_the_interface_does_not_show(folder: Path, tmp_path: Path) -> None:
    """A model whose attention does something behind the interface's back is found out by its logits."""
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        runner = llm.engine.runner
        config = runner.model.config
        assert measure_difference(runner, 16) < 1e-5
        assert check_parity(runner, config, 16, cache_folder=tmp_path)
        assert not check_parity(runner, config, 16, cache_folder=tmp_path), "the verdict is on record"
        original = runner.sites[1].attend
        runner.sites[1].attend = lambda *args: original(*args) * 1.1  # type: ignore[method-assign]
        assert not check_parity(runner, config, 16, cache_folder=tmp_path)
        with pytest.raises(UnsupportedModelError, match="relative difference"):
            check_parity(runner, config, 16, cache_folder=tmp_path / "fresh")


def test_startup_reports_six_timed_steps_and_undoes_a_failed_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[StepReport] = []
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", on_step=reports.append):
        done = [report for report in reports if report.seconds is not None]
        assert [report.number for report in done] == [1, 2, 3, 4, 5, 6]
        assert all(report.fraction == 1.0 for report in done)
    closed: list[str] = []
    original = ModelRunner.close
    monkeypatch.setattr(ModelRunner, "close", lambda self: (closed.append("runner"), original(self))[1])
    monkeypatch.setattr(
        start, "check_parity", lambda *args, **options: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    with pytest.raises(StartupError, match=r"startup step 5 of 6 \(warm up\) failed: RuntimeError: out of memory"):
        LLM(folder, skip_tokenizer_init=True, memory="64MiB")
    assert closed == ["runner"]


def test_two_engines_do_not_share_anything(folder: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path, "gpt2")
    prompt = [9, 8, 7, 6]
    with (
        LLM(folder, skip_tokenizer_init=True, memory="64MiB") as one,
        LLM(other, skip_tokenizer_init=True, memory="64MiB") as two,
        LLM(folder, skip_tokenizer_init=True, memory="64MiB") as three,
    ):
        streams = [llm.stream([prompt], GREEDY) for llm in (one, two, three)]
        tokens: list[list[int]] = [[], [], []]
        for _ in range(6):
            for index, stream in enumerate(streams):
                tokens[index] += next(stream).token_ids
    assert tokens[0] == tokens[2] == generate(folder, prompt, 6)[0]
    assert tokens[1] == generate(other, prompt, 6)[0]


def test_padded_rows_give_what_separate_rows_give(tmp_path: Path) -> None:
    """The path for GPUs, run on the CPU: all architectures, trees and windows included."""
    from specplug.model.kv_cache import BlockTable
    from specplug.model.rows import ForwardRow, TreeMask

    for architecture in ARCHITECTURES:
        folder = save_model(tmp_path / architecture, architecture)
        with LLM(folder, skip_tokenizer_init=True, memory="64MiB", block_size=4) as llm:
            runner = llm.engine.runner
            outputs = []
            for padded in (False, True):
                runner.gather_rows = padded
                tables = []
                for blocks in ([0, 1, 2, 3, 4], [9, 5, 11, 6, 20], [30, 31, 32, 33, 34]):
                    tables.append(BlockTable(4))
                    tables[-1].extend(blocks)
                runner.forward(
                    [ForwardRow(list(range(3, 3 + n)), 0, t) for n, t in zip((9, 4, 12), tables, strict=True)]
                )
                tree = TreeMask.from_parents(12, [-1, -1, 0, 1, 3])
                rows = [
                    ForwardRow([7], 9, tables[0]),
                    ForwardRow([8, 9, 10], 4, tables[1]),
                    ForwardRow([11, 12, 13, 14, 15, 16], 12, tables[2], tree),
                ]
                outputs.append(runner.forward(rows))
            torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


def test_configs_are_never_written_to() -> None:
    from specplug.model.architecture.inspection import inspect_architecture

    config = make_config("gpt2")
    before = config.to_dict()
    inspect_architecture(config, torch.float32)
    assert config.to_dict() == before
