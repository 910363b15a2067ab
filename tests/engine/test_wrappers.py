"""The text part of a model that joins a text model with others runs from its checkpoint; the other parts are not loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, RequestError, SamplingParams
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from specplug.model.architecture.inspection import inspect_architecture
from specplug.model.head import Head
from specplug.model.kv_cache import BlockTable
from specplug.model.load.checkpoint import load_config, read_headers
from specplug.model.load.narrow_copy import make_narrow_copy
from specplug.model.load.weights import load_model
from specplug.model.rows import ForwardRow
from specplug.model.runner import ModelRunner
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.reference import decisive_prompts
from support.wrappers import WRAPPERS, save_wrapper

NEW_TOKENS = 14
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


TEXT_CLASSES = ("qwen3_5", "llama4")  # Transformers has a class of the text part alone that reads the whole checkpoint


def _is_tower(name: str) -> bool:
    return any(word in name for word in ("vision", "visual", "audio"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrappers")


def saved(root: Path, kind: str) -> Path:
    folder = root / kind
    return folder if folder.exists() else save_wrapper(folder, kind)


@pytest.mark.parametrize("kind", slow_except(WRAPPERS, "gemma3", "qwen3_vl"))
def test_equals_transformers_generate(root: Path, kind: str) -> None:
    folder = saved(root, kind)
    draft = save_model(root / f"{kind}-draft", "llama", seed=1, num_hidden_layers=1)
    pairs = decisive_prompts(folder, 4, NEW_TOKENS, VOCABULARY)
    methods: list[dict[str, Any] | None] = [
        None,
        {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
        {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3},
        {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3},
    ]
    for method in methods:
        with LLM(
            folder, skip_tokenizer_init=True, strict=True, memory="64MiB", block_size=4, speculative_config=method
        ) as llm:
            outputs = llm.generate([prompt for prompt, _ in pairs], GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == [output for _, output in pairs], method


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_a_text_does_not_reach_is_neither_planned_nor_loaded(
    root: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(root, kind)
    plan = plan_engine(EngineConfig(model=str(folder), skip_tokenizer_init=True, memory=64 << 20))
    towers = plan.architecture.towers
    assert kind in TEXT_CLASSES or any(_is_tower(tower) for tower in towers)
    model = load_model(folder, plan.model_config, torch.float32, torch.device("cpu"), towers=towers)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert not [name for name in names if _is_tower(name) or name.startswith(tuple(f"{tower}." for tower in towers))]
    assert any(_is_tower(name) for name in read_headers(folder))
    held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert plan.facade.weight_bytes == sum(held.values())
    assert not caplog.records


def test_the_parity_probe_finds_a_narrow_copy_whatever_the_tower_holds(root: Path) -> None:
    config = load_config(saved(root, "gemma3"))
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 1152, 4000  # 1.6 GB of float32 in full
    config.vision_config.num_hidden_layers = 27
    narrow = make_narrow_copy(config, inspect_architecture(config, torch.float32), 12, 4)
    assert narrow is not None
    assert narrow.model.model.vision_tower is None


@pytest.mark.parametrize("kind", [kind for kind in WRAPPERS if kind != "qwen3_5"])  # it needs states
def test_the_head_that_speculators_get_gives_the_models_logits(root: Path, kind: str) -> None:
    config = load_config(saved(root, kind))
    narrow = make_narrow_copy(config, inspect_architecture(config, torch.float32), 12, 4)
    assert narrow is not None
    runner = ModelRunner(narrow.model, narrow.architecture, narrow.cache, narrow.device, ["final"])
    table = BlockTable(4)
    table.extend(range(2))
    logits = runner.forward([ForwardRow([5, 6, 7, 8, 9], 0, table)])
    torch.testing.assert_close(Head(runner.model).logits(runner.taps.captured["final"]), logits)


@pytest.mark.parametrize(
    "prompt", [{"prompt_token_ids": [5], "multi_modal_data": {"image": "x"}}, {"prompt": "a", "images": ["x"]}]
)
def test_images_in_a_prompt_are_refused_with_one_line(root: Path, prompt: dict[str, Any]) -> None:
    with (
        LLM(saved(root, "gemma3"), skip_tokenizer_init=True, memory="64MiB", compile=False) as llm,
        pytest.raises(RequestError, match=r"cannot be given: only the text part of a model runs"),
    ):
        llm.generate(prompt, GREEDY)


def test_images_in_a_chat_are_refused_with_one_line(root: Path) -> None:
    content = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with (
        LLM(saved(root, "gemma3"), skip_tokenizer_init=True, memory="64MiB", compile=False) as llm,
        pytest.raises(RequestError, match=r"'image_url' cannot be given: only the text part of a model runs"),
    ):
        llm.chat([{"role": "user", "content": content}], GREEDY)
