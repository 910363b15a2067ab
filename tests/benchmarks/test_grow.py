"""A grown model computes what its source computes, at every size that is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grow import PRESETS, GrowthError, Sizes, grow, main, map_boundaries, place_heads
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from specplug.tiny import resolve_model
from support.models import save_model

pytestmark = pytest.mark.unit

TINY = Path(resolve_model("tiny"))
TINY_SIZES = Sizes(192, 12, 512, 3, 1)
LARGER: dict[str, int] = {
    "hidden_size": 256,
    "num_layers": 14,
    "intermediate_size": 640,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PROMPT = "def read_lines(path, encoding):\n    lines = []\n    with open(path, encoding=encoding) as stream:\n"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def run(model: Any, ids: torch.Tensor) -> Any:
    return model(ids, output_hidden_states=True)


@pytest.fixture(scope="module")
def grown_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    grow("tiny", folder, **LARGER, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def source() -> Any:
    return load(TINY)


@pytest.fixture(scope="module")
def grown(grown_folder: Path) -> Any:
    return load(grown_folder)


@pytest.fixture(scope="module")
def prompt(grown_folder: Path) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(grown_folder)(PROMPT, return_tensors="pt")["input_ids"]


def test_logits_are_the_sources(source: Any, grown: Any, prompt: torch.Tensor) -> None:
    expected, actual = run(source, prompt).logits, run(grown, prompt).logits
    assert (expected - actual).abs().max() < 1e-4
    assert torch.equal(expected.argmax(-1), actual.argmax(-1))


@pytest.mark.engine
def test_greedy_text_is_the_sources(source: Any, grown: Any, prompt: torch.Tensor) -> None:
    options = {"max_new_tokens": 48, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(source.generate(prompt, **options), grown.generate(prompt, **options))


def test_mapped_boundaries_hold_the_sources_residual_stream(
    source: Any, grown: Any, grown_folder: Path, prompt: torch.Tensor
) -> None:
    boundaries = json.loads((grown_folder / "growth.json").read_text(encoding="utf-8"))["boundaries"]
    assert boundaries == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 14]
    expected, actual = run(source, prompt).hidden_states, run(grown, prompt).hidden_states
    # The last entry is the final norm's output, for both.
    for old, new in enumerate(boundaries):
        torch.testing.assert_close(actual[new][..., :192], expected[old], rtol=1e-4, atol=1e-4)
        assert not actual[new][..., 192:].any()


def test_only_outputs_have_zero_weights(grown_folder: Path) -> None:
    weights = load_file(grown_folder / "model.safetensors")
    with_zeros = {name.split(".")[-2] for name, weight in weights.items() if (weight == 0).float().mean() > 0.01}
    assert with_zeros == {"embed_tokens", "o_proj", "down_proj"}
    smallest = torch.finfo(torch.bfloat16).tiny
    assert all(weight[weight != 0].abs().min() >= smallest for weight in weights.values() if weight.any())


def test_folder_is_complete(grown_folder: Path, grown: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (grown_folder / name).read_bytes() == (TINY / name).read_bytes()
    growth = json.loads((grown_folder / "growth.json").read_text(encoding="utf-8"))
    assert growth["grown"] == LARGER
    assert growth["parameters"] == sum(parameter.numel() for parameter in grown.parameters())
    assert grown.generation_config.eos_token_id == 0
    assert grown.config.head_dim == 64
    assert grown.config.tie_word_embeddings


@pytest.mark.engine
def test_bfloat16_keeps_the_function_where_the_norms_scale_exactly(tmp_path: Path, prompt: torch.Tensor) -> None:
    sizes = {**LARGER, "hidden_size": 768, "num_layers": 12}
    assert grow("tiny", tmp_path, **sizes).dtype == "bfloat16"
    grown = load(tmp_path, torch.bfloat16)
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    for name, weight in load(TINY, torch.bfloat16).state_dict().items():
        if name.endswith("norm.weight"):
            assert torch.equal(grown.state_dict()[name][:192], weight / 2)
    expected = run(load(TINY), prompt).logits
    assert (run(grown, prompt).logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize(("queries", "keys"), [(4, 2), (6, 2), (6, 6), (8, 4), (12, 2), (12, 4), (10, 5)])
@pytest.mark.parametrize("tied", [True, False])
def test_any_grouping_of_heads(tmp_path: Path, queries: int, keys: int, tied: bool) -> None:
    save_model(tmp_path / "source", "llama", tie_word_embeddings=tied, head_dim=6, rms_norm_eps=0.01)
    sizes = {"hidden_size": queries * 10, "num_layers": 7, "intermediate_size": 48}
    grow(
        tmp_path / "source",
        tmp_path / "grown",
        **sizes,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        dtype="float32",
    )
    ids = torch.arange(3, 60)[None]
    expected, actual = (run(load(tmp_path / name), ids) for name in ("source", "grown"))
    assert (expected.logits - actual.logits).abs().max() < 1e-4 * expected.logits.abs().max()


def test_same_seed_same_weights_and_global_generator_untouched(tmp_path: Path) -> None:
    save_model(tmp_path / "source", "llama")
    sizes = {**LARGER, "num_layers": 4}
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        grow(tmp_path / "source", tmp_path / name, **sizes, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again != other


def test_presets_hold_tiny() -> None:
    for sizes in PRESETS.values():
        queries, _ = place_heads(TINY_SIZES, sizes)
        assert len(set(queries)) == 3
    assert map_boundaries(12, 24) == tuple(range(0, 25, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128}, "hidden_size is 128; the source has 192"),
        ({"num_layers": 8}, "num_layers is 8; the source has 12, and growing removes nothing"),
        ({"intermediate_size": 0}, "intermediate_size is 0; the source has 512"),
        ({"num_attention_heads": 2}, "num_attention_heads is 2; the source has 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; the source has 1"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5; it must be a multiple of num_key_value_heads, 2"),
        ({"num_attention_heads": 6}, "hidden_size is 256; it must be a multiple of num_attention_heads, 6"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of bfloat16, float32"),
    ],
)
def test_impossible_sizes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GrowthError, match=message):
        grow("tiny", tmp_path / "out", **{**LARGER, **changes})
    assert not (tmp_path / "out").exists()


def test_impossible_groups() -> None:
    with pytest.raises(GrowthError, match=r"3 key/value heads of 2 .* 2 of 4; any multiple of 2 can"):
        place_heads(Sizes(64, 2, 64, 8, 2), Sizes(96, 2, 64, 6, 3))


def test_impossible_sources(tmp_path: Path) -> None:
    with pytest.raises(GrowthError, match=r"holds no config\.json"):
        grow(tmp_path / "missing", tmp_path / "out", **LARGER)
    with pytest.raises(GrowthError, match="type 'qwen3'; only 'llama'"):
        grow(save_model(tmp_path / "qwen3", "qwen3"), tmp_path / "out", **LARGER)
    with pytest.raises(GrowthError, match="biases"):
        grow(save_model(tmp_path / "biased", "llama", mlp_bias=True), tmp_path / "out", **LARGER)
    with pytest.raises(GrowthError, match="would replace its source"):
        grow(save_model(tmp_path / "llama", "llama"), tmp_path / "llama", **LARGER)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "grown"
    arguments = ["grow.py", "tiny", "--out", str(folder), "--hidden-size", "256", "--num-attention-heads", "4"]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    printed = capsys.readouterr().out
    assert "7.7 million parameters, bfloat16" in printed
    assert "hidden_size             192 -> 256" in printed
    assert json.loads((folder / "growth.json").read_text(encoding="utf-8"))["grown"]["num_layers"] == 12
    monkeypatch.setattr("sys.argv", ["grow.py", "tiny", "33M", "--out", str(folder), "--num-layers", "8"])
    with pytest.raises(SystemExit) as failure:
        main()
    assert failure.value.code == 2
    assert "num_layers is 8; the source has 12" in capsys.readouterr().err
