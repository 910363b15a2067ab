"""GGUF files: what Transformers generates from the same file, in the bytes that were planned; and what is refused."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from specplug import LLM, SamplingParams
from specplug.cli.main import cli
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from specplug.engine.startup import allocation
from specplug.errors import CheckpointError, ConfigurationError, InsufficientMemoryError
from specplug.model.load.checkpoint import load_config, read_headers, resolve_checkpoint
from specplug.model.load.gguf_loading import reading_gguf
from specplug.model.load.weights import load_model
from specplug.tiny import resolve_model
from support.gguf_files import SIZES, convert, save_gguf
from support.held import held_bytes
from support.models import save_model
from support.peak import tensor_bytes
from support.quantised import decided_pairs

gguf = pytest.importorskip("gguf")
NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
CPU = torch.device("cpu")
KINDS = [("llama", "Q8_0"), ("llama", "F16"), ("qwen2", "Q4_0"), ("qwen3", "Q8_0"), ("qwen3", "BF16")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def saved(root: Path, architecture: str = "llama", quantisation: str = "Q8_0") -> Path:
    file = root / f"{architecture}-{quantisation}" / "model.gguf"
    if not file.exists():
        file.parent.mkdir()
        save_gguf(file, architecture, quantisation)
    return file


def plan(model: Path, **options: Any) -> Any:
    options = {"skip_tokenizer_init": True, "memory": 64 << 20, **options}
    return plan_engine(EngineConfig(model=str(model), **options))


@pytest.mark.parametrize(("architecture", "quantisation"), KINDS)
def test_equals_transformers_generate_of_the_same_file(root: Path, architecture: str, quantisation: str) -> None:
    file = saved(root, architecture, quantisation)
    pairs = decided_pairs(file, "gguf", 3, NEW_TOKENS)
    methods: list[dict[str, Any] | None] = [
        None,
        {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
        {"method": "draft_model", "model": str(file), "num_speculative_tokens": 3},
    ]
    for method in methods:
        with LLM(file, skip_tokenizer_init=True, strict=True, memory="64MiB", speculative_config=method) as llm:
            assert llm.engine.runner.cache.dtype == torch.float32
            outputs = [output.outputs[0].token_ids for output in llm.generate([p for p, _ in pairs], GREEDY)]
        assert [ids[: len(own)] for ids, (_, own) in zip(outputs, pairs, strict=True)] == [own for _, own in pairs]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("architecture", "quantisation"), KINDS)
def test_the_plan_counts_the_dequantised_bytes(
    root: Path, architecture: str, quantisation: str, dtype: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = saved(root, architecture, quantisation)
    capfd.readouterr()
    planned = plan(file, dtype=dtype)
    model = load_model(file, planned.model_config, planned.dtype, CPU)
    assert held_bytes(model) == pytest.approx(planned.facade.weight_bytes, rel=0.02)
    assert capfd.readouterr() == ("", "")


def test_what_is_planned_is_live(root: Path) -> None:
    file, before = saved(root), tensor_bytes()
    with LLM(file, skip_tokenizer_init=True, memory="8MiB") as llm:
        assert tensor_bytes() - before == pytest.approx(llm.engine.plan.total_bytes, rel=0.02)


def test_a_peak_above_all_else_is_planned(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "m.gguf", "llama", "Q8_0", vocab_size=8192, max_position_embeddings=16)
    least = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "dtype": "bfloat16"}
    planned = plan(file, **least)
    assert planned.plan.loading > 0
    total, weights = planned.plan.total_bytes, planned.facade.weight_bytes
    assert total - weights == pytest.approx(3 * 4 * 8192 * 64, rel=0.02)  # the largest table, three times in float32
    assert plan(file, dtype="bfloat16", max_num_seqs=256).plan.loading == 0
    assert plan(file, **least, memory=total).plan.total_bytes == total
    with pytest.raises(
        InsufficientMemoryError, match=r"reading the weights needs .* to dequantise them\), and the budget"
    ):
        plan(file, **least, memory=total - 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_planned_peak_is_not_exceeded(tmp_path: Path, dtype: str) -> None:
    file = save_gguf(tmp_path / "m.gguf", "llama", "Q8_0", vocab_size=32000, hidden_size=512, intermediate_size=2048)
    planned = plan(file, dtype=dtype, memory=4 << 30)
    loading = planned.architecture.loading_bytes
    script = Path(__file__).parent.parent / "support" / "loading_peak.py"
    done = subprocess.run(
        [sys.executable, script, saved(tmp_path), file, dtype], capture_output=True, text=True, check=True
    )
    assert 0.3 * loading < int(done.stdout) - planned.facade.weight_bytes < 1.05 * loading


def test_a_folder_with_one_file_is_that_file(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(root)
    assert resolve_checkpoint(str(file.parent)) == file
    assert resolve_checkpoint(str(file)) == file
    (tmp_path / file.name).write_bytes(b"another")  # Transformers would look here first
    monkeypatch.chdir(tmp_path)
    with LLM(file.parent, skip_tokenizer_init=True, memory="64MiB") as llm:
        (own,) = llm.generate([[5, 6, 7]], GREEDY)
    monkeypatch.chdir(file.parent)
    with LLM(file.name, skip_tokenizer_init=True, memory="64MiB") as llm:
        assert llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids == own.outputs[0].token_ids


def test_safetensors_come_first(root: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    shutil.copy(saved(root), folder)
    assert resolve_checkpoint(str(folder)) == folder


def test_tokenizer_and_end_are_those_of_the_file(tmp_path: Path) -> None:
    file = convert(Path(resolve_model("tiny")), tmp_path / "m.gguf", "F32")
    greedy = SamplingParams(temperature=0, max_tokens=24)
    prompts = ["def read(path):\n", "import os\n"]
    texts = []
    for model in ("tiny", file):
        with LLM(model, dtype="float32", memory="64MiB", speculative_config={"method": "ngram"}) as llm:
            texts.append([output.outputs[0].text for output in llm.generate(prompts, greedy)])
            assert llm.get_tokenizer().eos_token_id == 0
    assert texts[0] == texts[1]


def test_the_command_takes_a_file(tmp_path: Path) -> None:
    file = convert(Path(resolve_model("tiny")), tmp_path / "m.gguf", "Q8_0")
    common = (str(file), "--memory", "64MiB")
    done = CliRunner().invoke(cli, ["plan", *common, "--json"])
    assert json.loads(done.output)["architecture"] == "LlamaForCausalLM"
    done = CliRunner().invoke(
        cli, ["generate", *common, "--prompt", "def main():", "--max-tokens", "8", "--temperature", "0"]
    )
    assert (done.exit_code, done.stdout.startswith("\n    ")) == (0, True)


def test_it_can_be_quantised_on_load(root: Path) -> None:
    with LLM(saved(root), skip_tokenizer_init=True, memory="64MiB", quantization="int8") as llm:
        assert held_bytes(llm.engine.runner.model) == pytest.approx(llm.engine.plan.target_weights, rel=0.02)
        assert llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids


def test_skipped_vocabularies_change_nothing_else(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "m.gguf", "llama", "Q8_0", vocab_size=5000)
    whole = gguf.GGUFReader(file)
    with reading_gguf():
        short = gguf.GGUFReader(file)
        assert type(short) is not type(whole)
    assert gguf.GGUFReader is type(whole)
    assert short.data_offset == whole.data_offset
    assert list(short.fields) == list(whole.fields)
    for name, field in whole.fields.items():
        other = short.fields[name]
        assert (other.offset, other.types) == (field.offset, field.types)
        if len(field.data) < 5000:
            assert other.contents() == field.contents()
    assert [t.name for t in short.tensors] == [t.name for t in whole.tensors]
    tokens, types = (short.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    assert (len(tokens.data), len(tokens.parts), len(types.data)) == (5000, 7, 1)
    assert load_config(file).vocab_size == 5000


@pytest.mark.parametrize(
    ("metadata", "tensors", "found"),
    [
        ({"llama.rope.scaling.type": "yarn"}, (), "llama.rope.scaling.type"),
        ({}, ("rope_freqs.weight",), "rope_freqs.weight"),
        ({"llama.rope.scaling.type": "none"}, (), None),
    ],
)
def test_rope_scaling_that_transformers_does_not_read_is_warned_of(
    tmp_path: Path, metadata: dict[str, str], tensors: tuple[str], found: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = convert(save_model(tmp_path / "plain", "llama", **SIZES), tmp_path / "m.gguf", "Q8_0", metadata, tensors)
    with caplog.at_level(logging.WARNING, "specplug"):
        load_model(file, load_config(file), torch.float32, CPU)
    assert [f"scales RoPE ('{found}'), which Transformers does not read" in r.message for r in caplog.records] == [
        True
    ] * bool(found)


def header(*values: bytes) -> bytes:
    """A file of values without tensors."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + b"".join(values)


def _value(name: str, kind: int, stored: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + stored


def _text(name: str, text: str) -> bytes:
    return _value(name, 8, struct.pack("<Q", len(text)) + text.encode())


def damaged(root: Path, to: Path, change: Callable[[bytes], bytes]) -> Path:
    to.write_bytes(change(saved(root).read_bytes()))
    return to


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda b: b[:-100], r"is truncated: [\d,]+ bytes where its header says [\d,]+; download it again"),
        (lambda b: b[:400], r"its header ends early \(400 bytes\)"),
        (lambda b: b[:4], "its header ends early"),
        (lambda b: b"", "does not begin with GGUF"),
        (lambda b: b"PK" + b[2:], "does not begin with GGUF"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "version 50331648, or big-endian"),
        (lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:], "truncated or damaged"),
        (lambda b: b.replace(b"general.architecture", b"general.architectura"), "has no general.architecture"),
        (lambda b: header(_text("general.architecture", "llama"), _text("split.count", "two")), "makes no sense"),
        (lambda b: header(_value("deep", 9, struct.pack("<IQ", 9, 1) * 100_000)), "makes no sense"),
        (
            lambda b: b.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bogus", 1),
            "architecture 'bogus'; .*safetensors",
        ),
    ],
)
def test_what_is_no_model_is_refused_before_weights_are_read(
    root: Path, tmp_path: Path, change: Callable[[bytes], bytes], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "load_model", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=text):
        LLM(damaged(root, tmp_path / "m.gguf", change), skip_tokenizer_init=True)


def test_parts_and_several_files_are_refused(root: Path, tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", "llama", **SIZES)
    part = convert(plain, tmp_path / "m-00001-of-00003.gguf", "Q8_0", {"split.count": 3, "split.no": 0})
    with pytest.raises(CheckpointError, match=r"is part 1 of 3 of a model.*llama-gguf-split --merge"):
        plan(part)
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(saved(root), folder / name)
    with pytest.raises(
        CheckpointError, match=r"has no config.json: it holds 2 GGUF files; give the path of one, such as 'a"
    ):
        plan(folder)
    shutil.copy(plain / "config.json", folder)
    with pytest.raises(CheckpointError, match=r"no safetensors weights, and 2 GGUF files; give the path of one"):
        plan(folder)


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    for source in ("m.gguf", str(tmp_path / "m.gguf")):
        with pytest.raises(CheckpointError, match=r"there is no file '.*m.gguf'; a GGUF file must be on this machine"):
            resolve_checkpoint(source)


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_a_missing_package_is_named(root: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, find = saved(root), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    with pytest.raises(CheckpointError, match=rf"not installed here: {missing}; pip install 'specplug\[gguf\]'"):
        plan(file)


def test_what_it_cannot_be_is_refused(root: Path, tmp_path: Path) -> None:
    file = saved(root)
    with pytest.raises(ConfigurationError, match="quantised weights cannot be split"):
        plan(file, tensor_parallel_size=2)
    with pytest.raises(CheckpointError, match=r"is a GGUF file, .*safetensors are needed here"):
        LLM(save_model(tmp_path, "llama"), skip_tokenizer_init=True, lora_modules={"a": str(file)}, memory="64MiB")
    with pytest.raises(CheckpointError, match=r"is a GGUF file, .*safetensors are needed here"):
        resolve_checkpoint(str(file), pickles=True)


def test_headers_are_those_of_the_dequantised_tensors(root: Path) -> None:
    headers = read_headers(saved(root))
    assert headers["blk.1.ffn_down.weight"].shape == (64, 128)
    assert {header.dtype for header in headers.values()} == {torch.float32}


def test_the_tokenizer_is_found_in_the_file(root: Path) -> None:
    with LLM(saved(root), memory="64MiB") as llm:
        assert llm.get_tokenizer().convert_ids_to_tokens([5]) == ["t5"]
