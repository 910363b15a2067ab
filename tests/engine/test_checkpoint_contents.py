"""What a checkpoint holds beside or instead of its model's tensors is named: refused, warned of, or harmless."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specplug import LLM
from specplug.bench.peers import TransformersModel
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from specplug.engine.startup import allocation
from specplug.errors import CheckpointError
from specplug.model.load.checkpoint import load_config, resolve_checkpoint
from specplug.model.load.weights import load_model
from specplug.tiny import resolve_model
from support.models import save_model

WEIGHT = "model.layers.1.mlp.up_proj.weight"
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def changed(folder: Path, to: Path, change: Callable[[Tensors], object]) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(
    "name",
    [
        f"{WEIGHT}_scale_inv",
        f"{WEIGHT}_scale",
        "model.layers.1.mlp.up_proj.input_scale",
        "model.layers.1.mlp.up_proj.scales",
        "model.layers.1.mlp.up_proj.qzeros",
        "model.layers.1.mlp.up_proj.g_idx",
        "model.layers.1.mlp.up_proj.SCB",
        f"{WEIGHT}.absmax",
        f"{WEIGHT}.quant_state.bitsandbytes__nf4",
        "model.layers.0.self_attn.k_scale",
    ],
)
def test_scales_without_a_quantisation_config_are_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, name: str
) -> None:
    def quantise(tensors: Tensors) -> None:
        tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)
        tensors[name] = torch.ones(1)

    source = changed(folder, tmp_path / "fp8", quantise)
    with pytest.raises(CheckpointError, match=rf"has no quantization_config .* does not use 1 tensor: .*'{name}'"):
        plan_engine(EngineConfig.create(str(source), memory="64MiB"))


def test_integers_as_weights_are_refused_before_weights_are_read(folder: Path, tmp_path: Path) -> None:
    source = changed(folder, tmp_path / "int8", lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=f"has no quantization_config .*'{WEIGHT}'"):
        plan_engine(EngineConfig.create(str(source), memory="64MiB"))


def test_a_parameter_of_the_model_itself_is_no_quantisation_scale(tmp_path: Path) -> None:
    """BERT-like norms apart, some models have parameters that are called scales."""
    from specplug.model.architecture.inspection import inspect_architecture
    from specplug.model.load.checkpoint import read_headers
    from specplug.model.load.weights import count_weights

    source = save_model(tmp_path, "llama")
    headers = read_headers(source)
    headers = {**headers, "model.layers.0.router.per_expert_scale": headers["model.norm.weight"]}
    config = load_config(source)
    architecture = inspect_architecture(config, torch.float32)
    with pytest.raises(CheckpointError, match="per_expert_scale"):
        count_weights(source, headers, config, architecture, torch.float32, CPU)
    import attrs

    with_scale = attrs.evolve(architecture, tensor_kinds=architecture.tensor_kinds | {"per_expert_scale"})
    count_weights(source, headers, config, with_scale, torch.float32, CPU)


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["model.layers.0.self_attn.rotary_emb.inv_freq"], False),
        (["model.layers.3.eh_proj.weight", "model.layers.3.mlp.up_proj.weight", "mtp.fc.weight"], False),
        (["vision_tower.blocks.0.weight", "model.visual.patch.weight", "multi_modal_projector.linear_1.weight"], False),
        (["model.layers.0.attn.masked_bias"], False),
        (["model.layers.0.mlp.extra.weight", "odd"], True),
    ],
)
def test_leftover_tensors_are_named_unless_they_are_known_to_be_harmless(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str], warned: bool
) -> None:
    source = changed(folder, tmp_path / "more", lambda t: t.update({name: torch.ones(2) for name in names}))
    with caplog.at_level(logging.WARNING, "specplug"):
        load_model(source, load_config(source), torch.float32, CPU)
    messages = [record.getMessage() for record in caplog.records if record.name == "specplug"]
    assert len(messages) == warned
    assert all("LlamaForCausalLM does not use 2 tensors of the checkpoint" in message for message in messages)
    assert all("'model.layers.0.mlp.extra.weight', 'odd'" in message for message in messages)


def test_a_stored_output_layer_that_is_tied_is_harmless(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tied = save_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    source = changed(
        tied, tmp_path / "stored", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    load_model(source, load_config(source), torch.float32, CPU)
    assert not [record for record in caplog.records if record.name == "specplug"]


@pytest.mark.parametrize("name", [WEIGHT, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_no_missing_weight_is_ever_initialised(folder: Path, tmp_path: Path, name: str) -> None:
    source = changed(folder, tmp_path / "less", lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=f"1 weights are missing, first '{name}'"):
        load_model(source, load_config(source), torch.float32, CPU)


@pytest.mark.parametrize("by", ["engine", "bench"])
def test_nothing_of_transformers_load_report_is_printed(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, by: str
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["odd"] = torch.ones(2)

    source = changed(folder, tmp_path / "more", spoil)
    config = json.loads((source / "config.json").read_text())
    write(source / "config.json", config | {"eos_token_id": 9999})  # Transformers has a word to say about that too
    capfd.readouterr()
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        if by == "bench":
            TransformersModel(str(source), {}).open()
        else:
            load_model(source, load_config(source), torch.float32, CPU)
    captured = capfd.readouterr()
    assert "LOAD REPORT" not in captured.out + captured.err + caplog.text
    assert {record.name for record in caplog.records} <= {"specplug"}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "org/base"}, r"adapter \(LoRA\) for org/base, not a model"),
        ("adapter_config.json", "{", r"it is an adapter \(LoRA\), not a model"),
        ("model_index.json", {}, "it is a diffusion pipeline"),
        ("params.json", {}, "give the checkpoint in Hugging Face's format"),
        ("inner/config.json", {}, "its subfolder 'inner' has one; give that folder"),
        ("snapshots/abc/config.json", {}, "its subfolder 'snapshots/abc' has one; give that folder"),
        ("readme.txt", "", "it is not a Hugging Face checkpoint"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_named_for_what_it_is(
    tmp_path: Path, file: str, content: object, text: str
) -> None:
    write(tmp_path / file, content)
    with pytest.raises(CheckpointError, match=f"has no config.json.*{text}"):
        LLM(tmp_path, skip_tokenizer_init=True)


@pytest.mark.parametrize(("file", "text"), [("model.safetensors", "give its folder"), ("x", "is not a folder")])
def test_a_file_in_place_of_a_folder_is_named_for_what_it_is(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=text):
        resolve_checkpoint(str(tmp_path / file))


def test_an_adapter_in_a_models_folder_is_refused_whatever_is_installed(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "adapted")
    write(source / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    with pytest.raises(CheckpointError, match=r"adapter_config.json\) next to its config.json.*merge it .* or remove"):
        plan_engine(EngineConfig.create(str(source), memory="64MiB"))


def test_code_of_a_checkpoint_is_asked_for_only_where_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def download(source: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for trusted in (False, True):
        config = EngineConfig.create("acme/custom", memory="64MiB", trust_remote_code=trusted)
        plan_engine(config)
    assert ["*.py" in patterns for patterns in asked] == [False, True]


def test_a_model_with_code_of_its_own_says_that_it_must_be_trusted(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "custom")
    config = json.loads((source / "config.json").read_text())
    own = {"model_type": "acme", "auto_map": {"AutoConfig": "configuration_acme.AcmeConfig"}}
    write(source / "config.json", config | own)
    with pytest.raises(CheckpointError, match=r"'acme' needs the code .* set trust_remote_code=True"):
        LLM(source, skip_tokenizer_init=True)


def test_a_folder_without_a_tokenizer_says_so_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "load_model", lambda *args, **kwargs: pytest.fail("weights were read"))
    text = "has no tokenizer .*; name one with tokenizer=, or give token ids and skip_tokenizer_init=True"
    with pytest.raises(CheckpointError, match=text):
        LLM(folder, memory="64MiB")
    with pytest.raises(CheckpointError, match=text):
        LLM("tiny", tokenizer=str(folder), memory="64MiB")


def test_a_folder_that_hides_the_embedded_model_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_model("tiny")).is_absolute()
    Path("tiny").mkdir()
    with pytest.raises(
        CheckpointError, match=f"the folder {tmp_path / 'tiny'} hides the embedded model 'tiny'.*rename"
    ):
        LLM("tiny")
    shutil.copytree(folder, "tiny", dirs_exist_ok=True)
    for name in ("tiny", "tiny", "./tiny"):
        assert resolve_model(name) == name
    (message,) = [record.getMessage() for record in caplog.records if record.name == "specplug"]
    assert f"'tiny' is the folder {tmp_path / 'tiny'} here" in message
