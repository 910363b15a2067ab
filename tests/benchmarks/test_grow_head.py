"""A grown head drafts on a grown target what the small one drafts on the small target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from grow import GrowthError, grow
from grow_head import grow_head

from specplug import LLM, SamplingParams
from specplug.bench.peers import method_model
from specplug.tiny import resolve_model

SIZES: dict[str, int] = {
    "hidden_size": 256,
    "num_layers": 14,
    "intermediate_size": 640,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PROMPTS = ["def read_lines(path, encoding):\n    lines = []\n", "class Stack:\n    def __init__(self):\n"]
HEAD = Path(method_model("eagle3", "tiny"))


def generated(target: str, head: str) -> list[Any]:
    config = {"method": "eagle3", "model": head, "num_speculative_tokens": 3, "draft_sample_method": "greedy"}
    options: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "memory": "512MiB",
        "max_num_seqs": 2,
        "compile": False,
    }
    with LLM(target, speculative_config=config, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    return [(output.token_ids, output.metrics.acceptance_histogram) for output in outputs]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    grow("tiny", folder, **SIZES, dtype="float32")
    return folder


def test_drafts_and_acceptance_are_the_same(target: Path, tmp_path: Path) -> None:
    sizes = grow_head(HEAD, target, tmp_path)
    assert (sizes.hidden_size, sizes.num_attention_heads, sizes.intermediate_size) == (256, 4, 768)
    assert generated(str(target), str(tmp_path)) == generated("tiny", "tiny")


def test_taps_follow_the_target(target: Path, tmp_path: Path) -> None:
    grow_head(HEAD, target, tmp_path)
    ids = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["eagle_aux_hidden_state_layer_ids"]
    assert ids == [4 * 14 // 12, 8 * 14 // 12, 14]


def test_what_cannot_be_grown(target: Path, tmp_path: Path) -> None:
    with pytest.raises(GrowthError, match=r"holds no growth\.json"):
        grow_head(HEAD, tmp_path, tmp_path / "out")
    with pytest.raises(GrowthError, match="is no EAGLE-3 head"):
        grow_head(Path(resolve_model("tiny")), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
