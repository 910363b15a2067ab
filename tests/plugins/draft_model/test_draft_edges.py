"""Configuration, checkpoints, memory and contexts: what is refused and how, and what goes on without drafts."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import specplug.plugins.lazy_model as model_module
from specplug import LLM, ConfigurationError, SamplingParams
from specplug.config.engine import EngineConfig
from specplug.engine.planning import PlannedEngine, plan_engine
from specplug.errors import CheckpointError, InsufficientMemoryError, SpecplugError
from support.drafting import drafted_by, perturbed_copy, recorded, speculator_of
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.peak import PeakBytes, tensor_bytes
from support.reference import decisive_prompts

NEW_TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("target"), "llama", eos_token_id=None)


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed_copy(target, tmp_path_factory.mktemp("draft") / "model", 0.03)


@pytest.fixture(scope="module")
def pairs(target: Path) -> list[tuple[list[int], list[int]]]:
    return decisive_prompts(target, 8, NEW_TOKENS, VOCABULARY)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a draft's weights fails the test."""
    monkeypatch.setattr(model_module, "load_model", lambda *args, **kwargs: pytest.fail("weights were read"))


def plan(target: Path | str, **options: Any) -> PlannedEngine:
    return plan_engine(EngineConfig.create(str(target), skip_tokenizer_init=True, **options))


# ---- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle' for method 'draft_model'; did you mean 'model'"),
        ({"prompt_lookup_max": 3}, "unknown key 'prompt_lookup_max'"),
        ({"model": 3}, "draft_model.model=3: expected"),
        ({"draft_sample_method": "nucleus"}, "draft_sample_method='nucleus': expected one of greedy, probabilistic"),
        ({"draft_sample_method": None}, "draft_sample_method=None"),
        ({"draft_confidence_threshold": 1.0}, "draft_confidence_threshold=1.0: expected a probability"),
        ({"draft_confidence_threshold": -0.1}, "draft_confidence_threshold=-0.1"),
        ({"draft_confidence_threshold": "0.4"}, "draft_confidence_threshold='0.4'"),
        ({"draft_confidence_threshold": float("nan")}, "draft_confidence_threshold=nan"),
        ({"max_model_len": 0}, "max_model_len=0: expected an integer of at least 1"),
        ({"max_model_len": 2.5}, "max_model_len=2.5"),
        ({"use_heterogeneous_vocab": "yes"}, "use_heterogeneous_vocab='yes'"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"dtype": "float12"}, "float12"),
        ({"dtype": 16}, "dtype=16"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(
    target: Path, draft: Path, keys: dict[str, Any], message: str
) -> None:
    options = drafted_by(draft)
    options["speculative_config"].update(keys)
    with pytest.raises(SpecplugError) as error:
        plan(target, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [{}, {"model": None}], ids=["left out", "None"])
def test_a_draft_must_be_named_for_a_target_of_ones_own(target: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="needs the key 'model': a folder or hub name"):
        plan(target, speculative_config={"method": "draft_model", **config})


def test_every_key_is_accepted_as_vllm_has_it(target: Path, draft: Path) -> None:
    keys: dict[str, Any] = {
        "revision": "main",
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 100,
        "draft_sample_method": "probabilistic",
        "draft_confidence_threshold": 0,
        "use_heterogeneous_vocab": True,
    }
    (speculator,) = plan(target, memory="64MiB", **drafted_by(draft, **keys)).speculators
    assert speculator.instance.samples
    assert speculator.instance.max_model_len == 100
    assert speculator.instance.vocabulary.target_ids is None, "the tokenizers decide, not the key"


@pytest.mark.usefixtures("no_weights")
def test_the_embedded_draft_is_found(target: Path) -> None:
    by_default = plan("tiny", speculative_config={"method": "draft_model"})
    by_name = plan("tiny", speculative_config={"method": "draft_model", "model": "tiny"})
    assert by_default.plan.draft_weights == by_name.plan.draft_weights > 1_000_000
    assert by_default.speculators[0].instance.vocabulary.is_target_whole
    for_another = plan(target, speculative_config={"method": "draft_model", "model": "tiny"}, memory="64MiB")
    assert for_another.speculators[0].instance.vocabulary.size == VOCABULARY


# ---- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_config_of_another_vocabulary_than_the_weights_is_refused_by_name(
    target: Path, draft: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(draft, tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY + 8}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"'.*embed_tokens.*|lm_head.*': \[64, 32\], not \[72, 32\]") as error:
        LLM(target, skip_tokenizer_init=True, memory="64MiB", **drafted_by(folder))
    assert "config.json and weights belong to different models" in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "not a folder with a checkpoint"),
        ("no config", "no config.json"),
        ("no weights", "no safetensors weights"),
        ("truncated", "truncated"),
        ("empty", "damaged"),
        ("tokenizer", "no tokenizer that can be loaded"),
    ],
)
def test_a_damaged_draft_is_refused_before_weights_are_read(
    target: Path, draft: Path, tmp_path: Path, kind: str, message: str
) -> None:
    folder = tmp_path / "draft"
    if kind != "missing":
        shutil.copytree(draft, folder)
    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "tokenizer":
        (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as error:
        LLM(target, skip_tokenizer_init=True, memory="64MiB", **drafted_by(folder))
    assert str(folder) in str(error.value)


@pytest.mark.usefixtures("no_weights")
def test_a_draft_that_is_no_smaller_is_warned_of(
    target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = save_model(tmp_path / "large", "llama", hidden_size=64)
    small = save_model(tmp_path / "small", "llama", num_hidden_layers=1)
    with caplog.at_level(logging.WARNING, "specplug.draft_model"):
        plan(target, memory="64MiB", **drafted_by(small))
        assert not caplog.records
        planned = plan(target, memory="64MiB", **drafted_by(large))
    (record,) = caplog.records
    assert f"{planned.plan.draft_weights:,} bytes of weights, its target {planned.plan.target_weights:,}" in (
        record.getMessage()
    )


# ---- memory ------------------------------------------------------------------------------------------------------------


def drafting_bytes(planned: PlannedEngine) -> int:
    """What is planned for the peak of drafting; nothing of it lives between steps."""
    (region,) = (region for own in planned.regions for region in own if region.kind == "buffers")
    return region.fixed_bytes


@pytest.mark.parametrize("method", slow_except(["greedy", "probabilistic"], "probabilistic"))
def test_planned_and_allocated_differ_by_less_than_two_percent(tmp_path: Path, method: str) -> None:
    wide = save_model(tmp_path / "wide", "llama", hidden_size=64, vocab_size=256)
    options = drafted_by(save_model(tmp_path / "gpt2", "gpt2", vocab_size=256), draft_sample_method=method)
    drafting = drafting_bytes(plan(wide, memory="40MiB", **options))
    before = tensor_bytes()
    llm = LLM(wide, skip_tokenizer_init=True, memory="40MiB", **options)
    planned, handle = llm.engine.plan, speculator_of(llm).model
    assert tensor_bytes() - before == pytest.approx(planned.total_bytes - planned.step_bytes - drafting, rel=0.02)
    assert planned.draft_weights == handle.weight_bytes == sum(p.nbytes for p in handle._model.parameters())
    (own,) = (cache for cache in llm.engine._shared_caches if cache is not llm.engine.runner.cache)
    assert planned.draft_kv == own.num_bytes > 0
    params = [SamplingParams(temperature=t, max_tokens=20) for t in (0.0, 1.0)] * 2
    llm.generate([[3, 4, 5]] * 4, params)
    assert tensor_bytes() - before == pytest.approx(planned.total_bytes - planned.step_bytes - drafting, rel=0.03), (
        "something is left behind"
    )
    llm.close()
    del llm, handle, own
    assert tensor_bytes() - before < planned.total_bytes * 0.01, "something is left behind after close"


@pytest.mark.parametrize(("method", "gamma"), [("greedy", 4), ("probabilistic", 1), ("probabilistic", 8)])
def test_the_peak_of_drafting_is_planned(tmp_path: Path, method: str, gamma: int) -> None:
    """A vocabulary so wide that nothing else counts; all rows draft with every truncation."""
    vocabulary, rows = 4096, 16
    wide = save_model(tmp_path / "wide", "llama", vocab_size=vocabulary, num_hidden_layers=1, initializer_range=0.1)
    options = drafted_by(wide, gamma, draft_sample_method=method)
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, min_p=0.001, max_tokens=gamma + 4)
    with LLM(wide, skip_tokenizer_init=True, memory="256MiB", max_num_seqs=rows, strict=True, **options) as llm:
        speculator, (registered,) = speculator_of(llm), llm.engine.chain.speculators
        model, cache = speculator.model._model, speculator.model.runner.cache
        counter = PeakBytes([*model.parameters(), *model.buffers(), *cache.keys, *cache.values])
        propose = registered.propose

        def counted(batch: Any) -> Any:
            with counter:
                return propose(batch=batch)

        registered.propose = counted
        llm.generate([[3 + row, 4, 5] for row in range(rows)], params)
    planned = drafting_bytes(plan(wide, memory="256MiB", max_num_seqs=rows, **options))
    assert 0.75 * planned < counter.peak < 1.02 * planned


def test_the_plan_is_made_of_the_drafts_headers(target: Path, draft: Path) -> None:
    alone = plan(target, memory="64MiB").plan
    with_draft = plan(target, memory="64MiB", **drafted_by(draft, 6)).plan
    assert (alone.draft_weights, alone.draft_kv) == (0, 0)
    assert with_draft.draft_weights == alone.target_weights, "a copy is as large as the original"
    assert with_draft.draft_kv == with_draft.target_kv
    assert with_draft.scratch_tokens_per_row >= 6
    half = plan(target, memory="64MiB", **drafted_by(draft, dtype="bfloat16")).plan
    assert half.draft_kv * 2 == half.target_kv
    assert half.draft_weights < 0.6 * with_draft.draft_weights


@pytest.mark.usefixtures("no_weights")
def test_a_draft_that_does_not_fit_is_refused_in_the_plan_with_the_numbers(target: Path, tmp_path: Path) -> None:
    big = save_model(tmp_path / "big", "llama", hidden_size=256, intermediate_size=2048)
    plan(target, memory="4MiB", max_model_len=64)
    weights = plan(target, memory="64MiB", **drafted_by(big)).plan.draft_weights
    for start in (plan, lambda model, **options: LLM(model, skip_tokenizer_init=True, **options)):
        with pytest.raises(InsufficientMemoryError) as error:
            start(target, memory="4MiB", max_model_len=64, **drafted_by(big))
        assert f"draft weights {weights / 2**20:.1f} MiB" in str(error.value)
        assert "the budget is 4.0 MiB" in str(error.value)


# ---- contexts, devices, dtypes -----------------------------------------------------------------------------------------

SHORT = 30


def short_draft(root: Path, target: Path, kind: str) -> dict[str, Any]:
    """Drafts that know `SHORT` positions: rotary, a table that ends hard, and a key that says so."""
    if kind == "key":
        return {"model": target, "max_model_len": SHORT}
    if kind == "gpt2":
        return {"model": save_model(root / "gpt2", "gpt2", n_positions=SHORT, max_position_embeddings=None)}
    folder = shutil.copytree(target, root / "llama")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": SHORT}), encoding="utf-8")
    return {"model": folder}


@pytest.mark.parametrize("batched_tokens", [16, 1024], ids=["chunked", "whole"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "key"])
def test_rows_beyond_the_drafts_context_go_on_without_drafts(
    tmp_path: Path, target: Path, pairs: list[tuple[list[int], list[int]]], kind: str, batched_tokens: int
) -> None:
    options, made = recorded(**short_draft(tmp_path, target, kind))
    sizes: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": batched_tokens, "block_size": 4}
    with LLM(target, skip_tokenizer_init=True, memory="64MiB", **sizes, **options) as llm:
        forward, reached = made[0].inner.model.forward, []

        def spy(rows: Any, **keys: Any) -> Any:
            reached.extend(row.start + len(row.tokens) for row in rows)
            return forward(rows, **keys)

        made[0].inner.model.forward = spy  # type: ignore[method-assign]
        outputs = llm.generate([prompt for prompt, _ in pairs], GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == [output for _, output in pairs]
        assert llm.engine.chain.faults == {"recorded": 0}
    assert max(len(prompt) + NEW_TOKENS for prompt, _ in pairs) > SHORT + 10
    assert max(reached) <= SHORT
    assert {len(tokens) for tokens, _, _ in made[0].proposals} & {SHORT - 1, SHORT}
    assert max(len(tokens) for tokens, _, _ in made[0].proposals) <= SHORT
    if kind != "gpt2":
        assert max(len(tokens) + len(drafted) for tokens, drafted, _ in made[0].proposals) == SHORT + 1


def test_the_last_position_of_the_target_is_reached_with_a_draft_that_knows_more(target: Path, tmp_path: Path) -> None:
    longer = save_model(tmp_path / "longer", "llama", seed=3, max_position_embeddings=500)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    prompt = [3 + index % 40 for index in range(130)]
    with LLM(target, skip_tokenizer_init=True, memory="64MiB") as llm:
        expected = llm.generate([prompt], params)[0].outputs[0].token_ids
    with LLM(target, skip_tokenizer_init=True, memory="64MiB", strict=True, **drafted_by(longer)) as llm:
        assert speculator_of(llm).max_model_len == 500
        assert llm.generate([prompt], params)[0].outputs[0].token_ids == expected
    assert len(expected) == 30


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
@pytest.mark.parametrize(
    "keys", [{"dtype": "bfloat16"}, {"dtype": "auto"}, {"device": "cpu"}], ids=["bfloat16", "auto", "cpu"]
)
def test_output_is_exact_whatever_the_draft_is_held_in(
    target: Path, draft: Path, pairs: list[tuple[list[int], list[int]]], keys: dict[str, str], method: str
) -> None:
    options = drafted_by(draft, draft_sample_method=method, **keys)
    with LLM(target, skip_tokenizer_init=True, memory="64MiB", strict=True, **options) as llm:
        handle = speculator_of(llm).model
        assert handle.dtype == (torch.bfloat16 if keys.get("dtype") == "bfloat16" else torch.float32)
        outputs = llm.generate([prompt for prompt, _ in pairs], GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == [output for _, output in pairs]
        assert llm.engine.stats.num_accepted_draft_tokens > 50
        llm.generate([prompt for prompt, _ in pairs], SamplingParams(temperature=1.0, max_tokens=12))


def test_the_same_device_by_name_is_planned_with_the_target(target: Path, draft: Path) -> None:
    named = plan(target, memory="64MiB", device="cpu", **drafted_by(draft, device="cpu")).plan
    assert named == plan(target, memory="64MiB", device="cpu", **drafted_by(draft)).plan
    assert named.elsewhere == ()


def test_a_row_that_wants_fewer_drafts_gets_fewer(target: Path, draft: Path) -> None:
    options, made = recorded(draft, 6)
    with LLM(target, skip_tokenizer_init=True, memory="64MiB", strict=True, **options) as llm:
        wishes = [None, 2, 0]
        llm.generate(
            [[3, 4, 5], [6, 7, 8], [9, 10, 11]],
            [SamplingParams(temperature=0, max_tokens=20, num_speculative_tokens=wish) for wish in wishes],
        )
    longest = dict.fromkeys((3, 6, 9), 0)
    for tokens, drafted, _ in made[0].proposals:
        longest[tokens[0]] = max(longest[tokens[0]], len(drafted))
    assert longest == {3: 6, 6: 2, 9: 0}
