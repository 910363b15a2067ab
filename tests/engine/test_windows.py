"""Each layer attends as far as the model's own mask reaches, and the parity probe sees a wrong window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specplug import LLM, Proposal, SamplingParams, SpecplugError, SpeculatorTraits, hookimpl, native
from specplug.errors import UnsupportedModelError
from specplug.model.architecture import inspection, masks
from specplug.model.architecture.inspection import inspect_architecture
from specplug.model.architecture.masks import learn_mask
from specplug.model.load.narrow_copy import make_narrow_copy
from specplug.model.load.parity import measure_attention, measure_difference
from support.models import VOCABULARY, make_config, save_model
from support.reference import decisive_prompts
from support.speculators import provide

WINDOW = 12  # beyond what a probe of a few tokens would see
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SILENT: dict[
    str, dict[str, Any]
] = {  # models that put the window into their mask, and tell the attention function nothing
    "qwen2_moe": {
        **EXPERTS,
        "shared_expert_intermediate_size": 16,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "phimoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
    },
}


@pytest.mark.parametrize("architecture", list(SILENT))
def test_windows_that_only_the_mask_knows_are_obeyed(tmp_path: Path, architecture: str) -> None:
    folder = save_model(tmp_path, architecture, **SILENT[architecture])
    pairs = decisive_prompts(folder, 5, 12, VOCABULARY)
    assert max(len(prompt) for prompt, _ in pairs) > 2 * WINDOW
    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB") as llm:
        outputs = llm.generate([prompt for prompt, _ in pairs], SamplingParams(temperature=0, max_tokens=12))
    assert [output.outputs[0].token_ids for output in outputs] == [output for _, output in pairs]


def test_every_layer_has_the_window_of_its_own_mask() -> None:
    config = make_config("qwen2_moe", **SILENT["qwen2_moe"])
    layers = inspect_architecture(config, torch.float32).calls
    assert [call.mask.window for call in layers] == [WINDOW, None, None]  # every other layer below max_window_layers


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("qwen2_moe", {**SILENT["qwen2_moe"], "sliding_window": 4096, "max_window_layers": 28, "num_hidden_layers": 4}),
        ("gemma3_text", {"sliding_window": 1024}),
        ("llama", {}),
    ],
)
def test_the_probe_sees_a_wrong_window_in_any_single_layer(architecture: str, options: dict[str, Any]) -> None:
    """Whatever the real window: the narrow copy's rows are longer than every window of its own."""
    config = make_config(architecture, **options)
    narrow = make_narrow_copy(config, inspect_architecture(config, torch.float32), 12, 4)
    assert narrow is not None
    assert measure_difference(narrow, 4) < 1e-5
    for site in narrow.sites:
        right = site.window
        for wrong in (right + 1, right - 1, None) if right else (20,):
            site.window = wrong
            assert measure_difference(narrow, 4) > 0.01, (narrow.sites.index(site), wrong)
        site.window = right
    assert measure_difference(narrow, 4) < 1e-5


def test_a_model_whose_windows_are_not_learnt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.load()  # from the usual cache
    monkeypatch.setenv("SPECPLUG_CACHE", str(tmp_path / "cache"))
    folder = save_model(tmp_path / "model", "qwen2_moe", **{**SILENT["qwen2_moe"], "sliding_window": 4096})
    monkeypatch.setattr(masks, "read_mask", lambda mask: masks.Mask())
    monkeypatch.setattr(inspection, "_known", inspection._known.__wrapped__)  # another test may have learnt them
    with pytest.raises(UnsupportedModelError, match=r"gives other logits packed and paged|but not in the mask"):
        LLM(folder, skip_tokenizer_init=True, memory="64MiB")


def test_masks_that_depend_on_keys_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "doge", num_experts=4, num_experts_per_tok=2, keep_window_size=64)
    with pytest.raises(SpecplugError, match="adds a mask or a bias of its own"):
        LLM(folder, skip_tokenizer_init=True, memory="64MiB")


def test_rounding_in_bfloat16_refuses_no_correct_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that rounding routes to other experts changes logits by more than 8 %; attention itself does not change."""
    native.load()  # from the usual cache
    monkeypatch.setenv("SPECPLUG_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = make_config("gpt_oss", num_hidden_layers=8, num_local_experts=16, initializer_range=0.02)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    with LLM(tmp_path / "model", dtype="bfloat16", skip_tokenizer_init=True, memory="64MiB") as llm:
        runner = llm.engine.runner
        assert max(measure_attention(runner, 16)) < 0.02
        site = runner.sites[5]
        site.attend, usual = lambda *how: usual(*how) * 1.05, site.attend  # type: ignore[method-assign]
        assert max(measure_attention(runner, 16)) > 0.04


def test_taps_where_layers_carry_several_streams_are_refused_at_the_start(tmp_path: Path) -> None:
    options = {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "intermediate_size": 48,
        "sliding_window": 6,
    }
    folder = save_model(tmp_path, "gemma3n_text", **options)

    class Tap:
        def __init__(self, boundary: Any) -> None:
            self.traits = SpeculatorTraits(hidden_states=(boundary,))

        @hookimpl
        def propose(self, batch: Any) -> Proposal:
            return Proposal([[1] for _ in batch.rows])

    def start(boundary: Any) -> LLM:
        return LLM(folder, skip_tokenizer_init=True, memory="64MiB", **provide(lambda c, t: Tap(boundary)))

    with pytest.raises(SpecplugError, match="carry more than one state per token; only 'final'"):
        start(1)
    with start("final") as llm:
        assert llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4))


def test_a_window_that_only_the_cache_of_generate_has_is_refused() -> None:
    """Prefill sees all keys there, and decoding the last few: no mask of ours gives both."""
    options = {"ffn_dim": 64, "sliding_window": 6, "num_codebooks": 2, "audio_vocab_size": 32}
    with pytest.raises(UnsupportedModelError, match="a window of 6 positions in its cache, but not in the mask"):
        inspect_architecture(make_config("moshi", **options), torch.float32)
    config = make_config("moshi", **{**options, "sliding_window": 160})
    assert [call.mask.window for call in inspect_architecture(config, torch.float32).calls] == [None] * 3


def test_a_mask_is_learnt_from_positions_far_apart() -> None:
    def window(size: int) -> Any:
        return lambda batch, head, query, key: (key <= query) & (key > query - size)

    assert learn_mask(lambda batch, head, query, key: key <= query, 1 << 17).window is None
    assert learn_mask(window(6), 160).window == 6
    assert learn_mask(window(4096), 1 << 17).window == 4096
    assert learn_mask(window(4096), 2048).window is None, "never reached"
    for foreign in (
        lambda batch, head, query, key: (key <= query) & (key // 8192 == query // 8192),  # chunks
        lambda batch, head, query, key: query >= 0,  # sees what comes later
        lambda batch, head, query, key: (key <= query) & ((key > query - 64) | (key < 4)),  # keeps the first keys
        lambda batch, head, query, key: (key <= query) & (key % 2 == 0),
    ):
        assert learn_mask(foreign, 1 << 17).misfit
